"""Writes the tokenizer goldens: what `tokenizers` and `sentencepiece` make of each line of
tokenizer_lines.py, for tests/models/tokenizer. See README.md for how to run it."""

import argparse
import io
import json
import pathlib

import sentencepiece
from gguf import GGUFReader
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers, processors, trainers

import tokenizer_lines

FOLDER = pathlib.Path(__file__).parent
# The small vocabularies are checked on the hand-written lines and every twelfth of the others.
NUM_WRITTEN = len(tokenizer_lines.SENTENCES + tokenizer_lines.CODE + tokenizer_lines.SHAPES)
STRIDE = 12

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace("{1,3}", "")
TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
          r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
          r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
DEEPSEEK_V3 = (r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
               r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

ADDED_LINES = [
    "a <lstrip> b", "a   <lstrip>   b", "<lstrip><rstrip>  x", "x <rstrip> \n\t y", "<rstrip><lstrip>",
    "word", "a word b", "aword word-word word_ word1 wordé éword word", "<short><shorter>", "<short>er>",
    "<short", "<<short>>", "caf\u00e9 cafe\u0301 X", "<both>", "  <both>  <both>  ", "a\u3000<lstrip>",
    "<plain> <plain>", "<s>x</s>", "x<s> y </s> z", " <s> ", "<s><s>", "end </s>",
]


def byte_level(*splits, add_prefix_space=False, use_regex=False):
    last = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=use_regex)
    return pre_tokenizers.Sequence([*splits, last]) if splits else last


def split(pattern, behavior="isolated", invert=False):
    return pre_tokenizers.Split(Regex(pattern), behavior=behavior, invert=invert)


def plain_and_special(tokenizer, texts, add_special_tokens=False):
    """Ids of each text as user content, and, where they differ, with special tokens found."""
    tokenizer.encode_special_tokens = True
    plain = [tokenizer.encode(t, add_special_tokens=add_special_tokens).ids for t in texts]
    tokenizer.encode_special_tokens = False
    found = [tokenizer.encode(t, add_special_tokens=add_special_tokens).ids for t in texts]
    return {"plain": [" ".join(map(str, ids)) for ids in plain],
            "special": {str(i): " ".join(map(str, ids))
                        for i, (ids, p) in enumerate(zip(found, plain)) if ids != p}}


def write(name, value):
    text = json.dumps(value, ensure_ascii=False, indent=0, sort_keys=False)
    (FOLDER / name).write_text(text + "\n", encoding="utf-8")


def gguf_tokenizer(path, configure):
    """Hugging Face's tokenizer over a GGUF vocabulary, with the model's published configuration:
    the conversion inside transformers 5.23 leaves out SmolLM2's Digits and Qwen2's NFC."""
    fields = GGUFReader(path).fields
    names = fields["tokenizer.ggml.tokens"].contents()
    kinds = [int(kind) for kind in fields["tokenizer.ggml.token_type"].contents()]
    merges = [tuple(m.split(" ", 1)) for m in fields["tokenizer.ggml.merges"].contents()]
    vocab = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    configure(tokenizer)
    for name, kind in zip(names, kinds):
        if kind == 3:
            tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False)])
        elif kind == 4:
            tokenizer.add_tokens([AddedToken(name, normalized=False)])
    return tokenizer


def smollm2(tokenizer):
    tokenizer.pre_tokenizer = byte_level(pre_tokenizers.Digits(individual_digits=True),
                                         use_regex=True)


def qwen2(tokenizer):
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = byte_level(split(QWEN2))


def train_byte_level(texts):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = byte_level(use_regex=True)
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(m) for m in model["merges"]]


def byte_level_variants(vocab, merges):
    """Name -> tokenizer with the pre-tokenizer and normalizer of a known family."""
    def make(pre_tokenizer, normalizer=None, ignore_merges=False):
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges))
        tokenizer.pre_tokenizer = pre_tokenizer
        if normalizer:
            tokenizer.normalizer = normalizer
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(["<s>", "</s>"])
        return tokenizer

    digits = pre_tokenizers.Digits(individual_digits=True)
    variants = {
        "gpt2": make(byte_level(use_regex=True)),
        "gpt2_prefix": make(byte_level(use_regex=True, add_prefix_space=True)),
        "smollm": make(byte_level(digits, use_regex=True)),
        "digit_runs": make(byte_level(pre_tokenizers.Digits(individual_digits=False), use_regex=True)),
        "llama3": make(byte_level(split(LLAMA3)), ignore_merges=True),
        "qwen2": make(byte_level(split(QWEN2)), normalizers.NFC()),
        "tekken": make(byte_level(split(TEKKEN)), ignore_merges=True),
        "inverted": make(byte_level(split(LLAMA3, "removed", invert=True))),
        "deepseek_llm": make(byte_level(
            split(r"[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"),
            split("[一-龥ࠀ-一가-\ud7ff]+"), digits)),
        "deepseek_v3": make(byte_level(
            split(r"\p{N}{1,3}"), split("[一-龥\u3040-ゟ゠-ヿ]+"), split(DEEPSEEK_V3))),
        "words_removed": make(byte_level(split(r"\w+", "removed"))),
    }
    variants["llama3"].post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B",
                                      special_tokens=[("<s>", vocab["<s>"])])])
    variants["qwen2"].add_tokens([AddedToken("<tool_call>", normalized=False)])
    variants["added"] = make(byte_level(use_regex=True), normalizers.NFC())
    variants["added"].add_special_tokens([AddedToken("<lstrip>", lstrip=True),
                                          AddedToken("<rstrip>", rstrip=True),
                                          AddedToken("<both>", lstrip=True, rstrip=True)])
    variants["added"].add_tokens([AddedToken("word", single_word=True, normalized=False),
                                  AddedToken("<short>"), AddedToken("<short>er>"),
                                  AddedToken("cafe\u0301"), AddedToken("<plain>", normalized=False)])
    return variants


def train_sentencepiece(texts, **options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, byte_fallback=True,
        normalization_rule_name="identity", num_threads=1, minloglevel=2, **options)
    return model.getvalue()


def llama2_variants(proto):
    """The BPE model as Hugging Face's converters write it: Llama 2 and Mistral."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    pieces = [processor.id_to_piece(i) for i in range(len(processor))]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for piece, i in vocab.items():
        if processor.is_control(i) or processor.is_byte(i) or processor.is_unknown(i):
            continue
        local = [(piece[:k], piece[k:]) for k in range(1, len(piece))
                 if piece[:k] in vocab and piece[k:] in vocab]
        merges += [(processor.get_score(i), pair) for pair in
                   sorted(local, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))]
    merges = [pair for _, pair in sorted(merges, key=lambda m: m[0], reverse=True)]

    def make(normalizer, pre_tokenizer, decoder):
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>",
                                         fuse_unk=True, byte_fallback=True))
        if normalizer:
            tokenizer.normalizer = normalizer
        if pre_tokenizer:
            tokenizer.pre_tokenizer = pre_tokenizer
        tokenizer.decoder = decoder
        tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])])
        return tokenizer

    replace = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                 decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return {
        "llama2": make(normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
                       None, replace),
        "mistral": make(None, pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first",
                                                       split=False), replace),
        "metaspace": make(None, pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always",
                                                         split=True),
                          decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                             decoders.Fuse(), decoders.Strip(" ", 1, 0)])),
    }


def description(tokenizer):
    """tokenizer.json without the vocabulary, which the variants of a family share."""
    value = json.loads(tokenizer.to_str())
    del value["model"]["vocab"], value["model"]["merges"]
    return value


def variant_goldens(variants, texts):
    goldens = {}
    for name, tokenizer in variants.items():
        lines = texts + ADDED_LINES if name == "added" else texts
        goldens[name] = {"tokenizer_json": description(tokenizer),
                         "with_special": tokenizer.encode("x").ids,
                         **plain_and_special(tokenizer, lines)}
    return goldens


def vocabulary_of(tokenizer):
    model = json.loads(tokenizer.to_str())["model"]
    return {"vocab": model["vocab"], "merges": model["merges"]}


def has_tie(processor, text):
    """True where two segmentations are as likely: versions of the library choose differently."""
    scores = [sum(map(processor.get_score, ids)) for ids in processor.nbest_encode(text, nbest_size=2)]
    return len(scores) == 2 and abs(scores[0] - scores[1]) < 1e-3


def write_sentencepiece(name, proto, texts, picked):
    (FOLDER / f"{name}.model").write_bytes(proto)
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    if name == "sentencepiece_unigram":
        picked, texts = zip(*[(i, text) for i, text in zip(picked, texts)
                              if not has_tie(processor, text)])
    ids = [processor.encode(text) for text in texts]
    write(f"tokenizer_{name}.json", {
        "lines": picked,
        "pieces": [processor.id_to_piece(i) for i in range(len(processor))],
        "scores": [processor.get_score(i) for i in range(len(processor))],
        "plain": [" ".join(map(str, line)) for line in ids],
        "decoded": [processor.decode(line) for line in ids]})


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=pathlib.Path, help="folder of the catalogue's models")
    models_folder = parser.parse_args().models
    texts = tokenizer_lines.lines()
    write("tokenizer_lines.json", texts)
    for name, configure in (("smollm2-135m-instruct", smollm2),
                            ("qwen2.5-coder-0.5b-instruct", qwen2)):
        tokenizer = gguf_tokenizer(models_folder / f"{name}.gguf", configure)
        write(f"tokenizer_{name}.json", plain_and_special(tokenizer, texts))

    picked = [*range(NUM_WRITTEN), *range(NUM_WRITTEN, len(texts), STRIDE)]
    few = [texts[i] for i in picked]
    corpus = [line for text in tokenizer_lines.SENTENCES + tokenizer_lines.CODE
              for line in text.splitlines() if line.strip()]
    byte_variants = byte_level_variants(*train_byte_level(corpus))
    write("tokenizer_byte_level.json", {
        **vocabulary_of(byte_variants["gpt2"]), "lines": picked,
        "added_lines": ADDED_LINES, "variants": variant_goldens(byte_variants, few)})

    options = {"remove_extra_whitespaces": False, "split_digits": True}
    llama = train_sentencepiece(corpus, model_type="bpe", vocab_size=1100,
                                character_coverage=0.98, **options)
    write_sentencepiece("sentencepiece_bpe", llama, few, picked)
    write_sentencepiece("sentencepiece_unigram", train_sentencepiece(
        corpus, model_type="unigram", vocab_size=1000, character_coverage=0.98,
        hard_vocab_limit=False, **options), few, picked)
    llama_variants = llama2_variants(llama)
    write("tokenizer_characters.json", {
        **vocabulary_of(llama_variants["llama2"]), "lines": picked,
        "variants": variant_goldens(llama_variants, few)})


if __name__ == "__main__":
    main()

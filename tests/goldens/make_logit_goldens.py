"""Writes logits_<model>.json: what `transformers` in fp32 says about each prompt of
logit_prompts.py, for tests/models/fidelity_test.cc. See README.md for how to run it."""

import argparse
import json
import pathlib

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import logit_prompts

NUM_TOP = 8            # tokens whose log-probability is kept at each position
CONTINUATION = 32      # greedy tokens after a short prompt
LONG_TOKENS = 2048
LONG_STRIDE = 16       # of a long prompt, every 16th position and the last 64 are kept
LONG_TAIL = 64


def encode_prompts(tokenizer):
    """Yields (name, token ids)."""
    for texts in (logit_prompts.PROSE, logit_prompts.CODE, logit_prompts.SCRIPTS):
        for name, text in texts.items():
            yield name, tokenizer(text).input_ids
    for name, messages in logit_prompts.CHATS.items():
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        yield name, tokenizer(text, add_special_tokens=False).input_ids
    for name, text in logit_prompts.long_texts().items():
        ids = tokenizer(text).input_ids
        assert len(ids) >= LONG_TOKENS, f"{name}: only {len(ids)} tokens"
        yield name, ids[:LONG_TOKENS]


def continue_greedily(model, ids):
    """The prompt's ids and up to CONTINUATION tokens after them."""
    out = model.generate(torch.tensor([ids]), max_new_tokens=CONTINUATION, do_sample=False,
                         repetition_penalty=1.0, pad_token_id=model.config.eos_token_id)
    return out[0].tolist()


def describe(model, name, prompt):
    is_long = name.startswith("long.")
    ids = prompt if is_long else continue_greedily(model, prompt)
    logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
    last = len(ids) - 1  # the last token has no successor to score
    positions = [p for p in range(last)
                 if not is_long or p % LONG_STRIDE == 0 or p >= last - LONG_TAIL]
    rows = []
    for p in positions:
        top = torch.topk(logprobs[p], NUM_TOP)
        rows.append([
            p,
            round(logprobs[p, ids[p + 1]].item(), 5),
            top.indices.tolist(),
            [round(value, 5) for value in top.values.tolist()],
        ])
    return {"name": name, "prompt_tokens": len(prompt), "token_ids": ids, "rows": rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=pathlib.Path, help="the model's file")
    parser.add_argument("--name", required=True, help="the model's name in models/catalog.json")
    args = parser.parse_args()

    source = dict(pretrained_model_name_or_path=str(args.gguf.parent), gguf_file=args.gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32,
                                                 attn_implementation="eager").eval()
    model.generation_config.eos_token_id = model.config.eos_token_id

    out = pathlib.Path(__file__).parent / f"logits_{args.name}.json"
    with torch.inference_mode(), out.open("w") as file:
        file.write('{"model": %s, "row_fields": ["position", "logprob of the next token", '
                   '"most likely tokens", "their logprobs"],\n"prompts": [\n' % json.dumps(args.name))
        for i, (name, ids) in enumerate(encode_prompts(tokenizer)):
            print(name, len(ids), flush=True)
            prompt = describe(model, name, ids)
            file.write((",\n" if i else "") + json.dumps(prompt, separators=(",", ":")))
        file.write("\n]}\n")


if __name__ == "__main__":
    main()

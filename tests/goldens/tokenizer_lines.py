"""The lines that the tokenizer goldens are made of: text of many scripts and shapes, the same on
every run (fixed seed, nothing read from outside but this file and Python's own Unicode tables)."""

import random
import unicodedata

SEED = 20240229

# First and last character of blocks, one entry a script or kind of symbol.
BLOCKS = {
    "latin": (0x0041, 0x007A), "latin1": (0x00A1, 0x00FF), "latin_extended": (0x0100, 0x024F),
    "ipa": (0x0250, 0x02AF), "modifiers": (0x02B0, 0x02FF), "marks": (0x0300, 0x036F),
    "greek": (0x0370, 0x03FF), "cyrillic": (0x0400, 0x04FF), "armenian": (0x0531, 0x058A),
    "hebrew": (0x0591, 0x05F4), "arabic": (0x0600, 0x06FF), "syriac": (0x0700, 0x074F),
    "thaana": (0x0780, 0x07B1), "nko": (0x07C0, 0x07FA), "devanagari": (0x0900, 0x097F),
    "bengali": (0x0980, 0x09FE), "gurmukhi": (0x0A01, 0x0A76), "gujarati": (0x0A81, 0x0AFF),
    "oriya": (0x0B01, 0x0B77), "tamil": (0x0B82, 0x0BFA), "telugu": (0x0C00, 0x0C7F),
    "kannada": (0x0C80, 0x0CF2), "malayalam": (0x0D00, 0x0D7F), "sinhala": (0x0D82, 0x0DF4),
    "thai": (0x0E01, 0x0E5B), "lao": (0x0E81, 0x0EDF), "tibetan": (0x0F00, 0x0FDA),
    "myanmar": (0x1000, 0x109F), "georgian": (0x10A0, 0x10FF), "jamo": (0x1100, 0x11FF),
    "ethiopic": (0x1200, 0x139F), "cherokee": (0x13A0, 0x13FD), "syllabics": (0x1400, 0x167F),
    "ogham": (0x1680, 0x169C), "runes": (0x16A0, 0x16F8), "khmer": (0x1780, 0x17F9),
    "mongolian": (0x1800, 0x18AA), "phonetic": (0x1D00, 0x1DBF), "latin_more": (0x1E00, 0x1EFF),
    "greek_extended": (0x1F00, 0x1FFE), "punctuation": (0x2000, 0x206F),
    "scripts_up_down": (0x2070, 0x209C), "currency": (0x20A0, 0x20C0),
    "letterlike": (0x2100, 0x214F), "numerals": (0x2150, 0x218B), "arrows": (0x2190, 0x21FF),
    "mathematics": (0x2200, 0x22FF), "technical": (0x2300, 0x23FF), "enclosed": (0x2460, 0x24FF),
    "boxes": (0x2500, 0x25FF), "symbols": (0x2600, 0x27BF), "braille": (0x2800, 0x28FF),
    "coptic": (0x2C80, 0x2CFF), "tifinagh": (0x2D30, 0x2D7F), "cjk_punctuation": (0x3000, 0x303F),
    "hiragana": (0x3041, 0x309F), "katakana": (0x30A0, 0x30FF), "bopomofo": (0x3105, 0x312F),
    "hangul_compatible": (0x3131, 0x318E), "cjk_enclosed": (0x3200, 0x32FF),
    "han_a": (0x3400, 0x4DBF), "han": (0x4E00, 0x9FFC), "yi": (0xA000, 0xA4C6),
    "hangul": (0xAC00, 0xD7A3), "han_compatible": (0xF900, 0xFAD9),
    "presentation": (0xFB00, 0xFDFF), "forms": (0xFE30, 0xFEFF), "full_width": (0xFF01, 0xFFEE),
    "private": (0xE000, 0xE0FF), "gothic": (0x10330, 0x1034A), "cuneiform": (0x12000, 0x12399),
    "mathematical": (0x1D400, 0x1D7FF), "emoji": (0x1F300, 0x1F64F),
    "emoji_more": (0x1F680, 0x1F9FF), "han_b": (0x20000, 0x2A6DD), "tags": (0xE0020, 0xE007F),
    "private_b": (0x100000, 0x1000FF),
}

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Portez ce vieux whisky au juge blond qui fume, n'est-ce pas ?",
    "Victor jagt zwölf Boxkämpfer quer über den großen Sylter Deich.",
    "El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia y frío.",
    "Zażółć gęślą jaźń; pójdź, kińże tę chmurność w głąb flaszy!",
    "Příliš žluťoučký kůň úpěl ďábelské ódy.",
    "Pijamalı hasta yağız şoföre çabucak güvendi. İstanbul'da ILIK ırmak.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία· τί δ' ἔστιν;",
    "דג סקרן שט בים מאוכזב ולפתע מצא חברה — שָׁלוֹם.",
    "صِف خَلقَ خَودٍ كَمِثلِ الشَمسِ إِذ بَزَغَت، ٣٫١٤ و٢٠٢٤.",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश १२३।",
    "কাজী নজরুল ইসলাম বাংলাদেশের জাতীয় কবি ৪৫৬।",
    "யாமறிந்த மொழிகளிலே தமிழ்மொழி போல் இனிதாவது எங்கும் காணோம்.",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า กว่าบรรดาฝูงสัตว์เดรัจฉาน ๑๒๓",
    "ခေါင်းလောင်းထိုးပါ။ မင်္ဂလာပါ ၁၂၃",
    "ភាសាខ្មែរ គឺជាភាសាផ្លូវការ ១២៣",
    "いろはにほへと ちりぬるを わかよたれそ つねならむ。",
    "色は匂へど散りぬるを、我が世誰ぞ常ならむ「２０２４年」",
    "我能吞下玻璃而不伤身体。敏捷的棕色狐狸跳过了懒狗！",
    "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다.",
    "Tiếng Việt: Con sói nâu nhảy qua người chú chó lười, được không?",
    "ქართული ენა; ვეფხის ტყაოსანი შოთა რუსთაველი.",
    "Հայերեն այբուբենը ստեղծել է Մեսրոպ Մաշտոցը։",
    "ሰላም ለዓለም፤ የአማርኛ ቋንቋ ፩፪፫",
    "ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ and ᐃᓄᒃᑎᑐᑦ and ᚠᛖᚩᚻ᛫ᛒᛦᚦ",
    "Smörgåsbord naïve façade coöperate Ångström Œuvre ﬁne ﬂow ß ẞ ſtill",
    "x² + y³ = ½·π·r² ≥ ∑ᵢ₌₁ⁿ αᵢ ⇒ ∀ε>0 ∃δ: |x−y|<δ, ℝ→ℂ, ⅷ Ⅻ ① ㊿",
    "Price: $1,234.56 / €9.99 / £0.50 / ¥1000 / ₹500 -- 15% off!!! #sale @shop",
    "https://example.org:8080/a/b?c=d&e=%20f#g user.name+tag@mail.example.co.uk",
    "2024-02-29T23:59:59.999+01:00 0xDEADBEEF 1e-10 3.14159265358979 1_000_000 007",
]

CODE = [
    "def f(x: int = 0, *args, **kwargs) -> dict[str, list[int]]:\n    return {k: [v] for k, v in kwargs.items()}\n",
    "class A(B):\n\t\"\"\"Doc.\"\"\"\n\n\tdef __init__(self):\n\t\tsuper().__init__()\n\t\tself._x = None  # note\n",
    "#include <vector>\nint main(int argc, char** argv) {\n  std::vector<int> v{1, 2, 3};\n  return v[0] == 1 ? 0 : -1;\n}\n",
    "for (let i = 0; i < arr.length; i++) { console.log(`${i}: ${arr[i]?.name ?? 'none'}`); }",
    "SELECT u.id, COUNT(*) AS n FROM users u LEFT JOIN orders o ON o.uid = u.id WHERE u.x <> 'it''s' GROUP BY 1 HAVING COUNT(*) > 10;",
    "<div class=\"a b\" data-x='1'><p>Hi &amp; bye</p><!-- c --></div>",
    "{\"a\": [1, 2.5, -3e10, null, true], \"b\": {\"c\": \"\\u00e9\\n\"}}",
    "fn main() -> Result<(), Box<dyn Error>> { let x = &mut vec![0u8; 1024]; x.iter().map(|b| b + 1).sum::<u8>(); Ok(()) }",
    "grep -rn 'foo\\|bar' --include='*.py' . | awk '{print $1}' | sort -u > /tmp/out.txt 2>&1",
    "\\begin{equation} \\int_0^\\infty e^{-x^2}\\,dx = \\frac{\\sqrt{\\pi}}{2} \\end{equation}",
    "if x:\n        pass\n    else:\n            raise ValueError(f\"{x!r:>10}\")\n\n\n\n",
    "| a | b |\n|---|:-:|\n| 1 | **2** |\n\n```python\nprint('x')\n```\n",
]

SHAPES = [
    " ", "  ", "   a", "a   ", "\t", "\t\t a", "\n", "\n\n", " \n", "\n ", "a\nb", "a\r\nb\r\n",
    "\r\n\r\n", "\r", "a\rb", " \r\n \t\r\n  x", "a\u00a0b", "\u00a0\u00a0", "\u3000\u3000x\u3000",
    "a\u2028b\u2029c", "a\u0085b", "\u0085\u0085 x", "a\u180eb", " \u180e x", "\u200b\u200b a\u200bb",
    "\u2000\u2001\u2002 \u2009a\u202fb\u205f", "\ufeffBOM", "a\u00adb", "\u200e\u200fmarks",
    "\x00", "\x00\x01\x02\x03\x04\x05\x06\x07", "a\x00b", "\x1b[31mred\x1b[0m", "\x7f\x80\x81\x9f",
    "\x0b\x0c\x1c\x1d\x1e\x1f", "a\x0bb\x0cc", "'", "''", "'s", "'S 's", "I'm you're he'll she'd we've it's don't",
    "I'M YOU'RE HE'LL SHE'D WE'VE IT'S DON'T", "I'm'll've", "'ſ 'ſs it'ſ", "x'Re y'vE z'lL",
    "’s I’m don’t", "'sa 'tb 'rec", "!'s?'t", "1's 2'd", " 's 't", "\n's", "a's\n",
    "1", "12", "123", "1234", "12345678901234567890", " 1 12 123 1234", "1a2b3c", "a1b22c333",
    "１２３４", "٠١٢٣٤", "१२३४५", "Ⅷ½²³①㊿𝟘𝟙", "1,234,567.89", "v1.2.3-rc4", "0x1F 0b101 1e9",
    "e\u0301", "e\u0301\u0327", "e\u0327\u0301", "\u0301e", " \u0301", "a\u0308\u0304", "\u1e09\u0323",
    "\u1100\u1161\u11a8", "\uac00\u11a8", "\u212b \u2126 \u212a", "\u0958\u09dc", "\u0344 \u0374 \u037e \u0387",
    "\uf900\uf901\ufa0e", "\u0f43\u0f73", "\u1f71\u1fbe", "q\u0323\u0307 q\u0307\u0323", "\u2adc",
    "क्षि त्र ज्ञ", "நி கெ கொ", "ก็ กำ", "n\u0303o\u0302\u0301", "\u0cc6\u0cc2\u0cd5",
    "👍", "👍🏽", "👨‍👩‍👧‍👦", "🏳️‍🌈🏴‍☠️", "🇩🇪🇯🇵🇺🇳", "1️⃣#️⃣*️⃣", "❤️‍🔥 ☺︎ ☺️", "🧑🏿‍🚀🤷🏻‍♀️", "🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "…—–‒―", "“quoted” ‘single’ «guillemets» 「corner」", "!!??!?", "...", "....", "-----", "=====",
    "a-b_c.d/e\\f|g", "@#$%^&*()", "~`<>[]{}", "::->=>", "!\n", "?\r\n\n", "//\n", " //\n\n ", "};\n}\n",
    "CamelCaseWord HTMLParser iPhone XMLHttpRequest snake_case_word SCREAMING_CASE",
    "\ufffd", "\ufffe\uffff", "\U0010ffff", "\U000e0001", "\ufdd0", "ﷺ ﷽", "ǅ ǈ ǋ", "ᾈ ᾼ",
    "<|im_start|>user\nhi<|im_end|>\n", "<|endoftext|>", "<tool_call>{}</tool_call>", "<|im_start", "|im_end|>",
    "<s>[INST] hi [/INST]</s>", "<unk>", "<0x0A>", "▁▁a", "Ġhello Ċ", "<|fim_prefix|>x<|fim_suffix|>",
]


def _printable(first, last):
    return [chr(c) for c in range(first, last + 1)
            if unicodedata.category(chr(c)) not in ("Cn", "Cs")]


def _runs():
    for unit in ["a", " ", "\n", "1", "!", "é", "中", "👍", "\t", "\r\n", "ab", "a ", " a", "0x", "=", "\u0301", "A", "の"]:
        for count in (5, 17, 64, 200):
            yield unit * count


def lines():
    """About 3,000 lines, each a str without lone surrogates, none empty, none twice."""
    rng = random.Random(SEED)
    blocks = {name: _printable(*ends) for name, ends in BLOCKS.items()}
    out = list(SENTENCES) + list(CODE) + list(SHAPES) + list(_runs())
    for text in SENTENCES:
        out += [" " + text, text.upper(), text.lower(), text + "\n", text.replace(" ", "  "),
                unicodedata.normalize("NFD", text), unicodedata.normalize("NFKC", text)]
        words = text.split(" ")
        for _ in range(6):
            rng.shuffle(words)
            out.append(" ".join(words[: rng.randint(1, len(words))]))
    for text in CODE:
        out += [text.replace("\n", "\r\n"), text.replace("    ", "\t"), "    " + text]
        for _ in range(6):
            begin = rng.randrange(len(text))
            out.append(text[begin: begin + rng.randint(5, 40)])
    for chars in blocks.values():
        for length in (1, 2, 4, 8, 12, 16):
            out.append("".join(rng.choice(chars) for _ in range(length)))
        for _ in range(6):
            words = ["".join(rng.choice(chars) for _ in range(rng.randint(1, 5))) for _ in range(4)]
            out.append(" ".join(words))
        for _ in range(4):
            glue = rng.choice([" ", "\n", "1", "'s ", "a", "\u0301", ", ", "!\n", "\u00a0"])
            out.append(glue.join(rng.choice(chars) for _ in range(6)))
    names = list(blocks)
    for _ in range(700):
        parts = []
        for _ in range(rng.randint(2, 5)):
            chars = blocks[rng.choice(names)]
            parts.append("".join(rng.choice(chars) for _ in range(rng.randint(1, 4))))
        out.append(rng.choice(["", " ", " "]).join(parts))
    for _ in range(700):
        out.append("".join(rng.choice(SHAPES) for _ in range(rng.randint(2, 4))))
    return list(dict.fromkeys(text for text in out if text))

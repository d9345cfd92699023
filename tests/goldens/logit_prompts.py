"""The texts whose logits are compared with the reference: plain text, code, many scripts, chats and
long inputs. Long ones are real texts of the machine that runs the generator (the golden file keeps
the token ids, so a test needs no source text)."""

import inspect
import pathlib

PROSE = {
    "prose.capital": "The capital of France is",
    "prose.history": (
        "In 1687 Isaac Newton published the Principia, in which he stated the laws of motion and of "
        "universal gravitation. The work was paid for by Edmond Halley, because the Royal Society "
        "had spent its budget on a book about the history of fish."),
    "prose.story": (
        "The lighthouse keeper climbed the last of the two hundred steps, set down his lantern and "
        "looked out over the water. Far to the west, where the sky was still red, a single sail was "
        "moving against the wind."),
    "prose.science": (
        "Photosynthesis converts light energy into chemical energy. In the light-dependent reactions, "
        "chlorophyll absorbs photons and water is split, releasing oxygen; in the Calvin cycle, carbon "
        "dioxide is fixed into sugars."),
    "prose.letter": (
        "Dear Ms. Okafor,\n\nThank you for your letter of 14 March. I am pleased to confirm that your "
        "application has been accepted, and that we expect you on Monday at 9:30 am.\n\nYours sincerely,"),
    "prose.recipe": (
        "Ingredients:\n- 200 g flour\n- 2 eggs\n- 300 ml milk\n- a pinch of salt\n\nMethod:\n1. Sift the "
        "flour into a bowl and make a well in the centre.\n2."),
    "prose.law": (
        "The Tenant shall pay the Rent in advance on the first day of each month, without any "
        "deduction or set-off, and shall keep the Premises in good and tenantable repair throughout the"),
    "prose.numbers": "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233,",
    "prose.arithmetic": "Q: A train travels 180 km in 2.5 hours. What is its average speed?\nA: 180 / 2.5 =",
    "prose.shouting": "WARNING!!! DO NOT OPEN THIS DOOR WHILE THE MACHINE IS RUNNING. IN CASE OF FIRE,",
    "prose.whitespace": "  Name\t\tAge\tCity\n  ----\t\t---\t----\n  Alice\t\t31\tOslo\n  Bob\t\t",
    "prose.one_token": "The",
}

CODE = {
    "code.python": (
        "def binary_search(items, target):\n    \"\"\"Index of target in sorted items, or -1.\"\"\"\n"
        "    low, high = 0, len(items) - 1\n    while low <= high:\n        middle = (low + high) // 2\n"),
    "code.cpp": (
        "#include <algorithm>\n#include <vector>\n\n// Removes duplicates, keeping the order of first "
        "appearance.\ntemplate <typename T>\nstd::vector<T> Unique(const std::vector<T>& values) {\n"),
    "code.rust": (
        "use std::collections::HashMap;\n\nfn word_counts(text: &str) -> HashMap<&str, usize> {\n"
        "    let mut counts = HashMap::new();\n    for word in text.split_whitespace() {\n"),
    "code.javascript": (
        "export async function fetchUser(id) {\n  const response = await fetch(`/api/users/${id}`);\n"
        "  if (!response.ok) {\n    throw new Error("),
    "code.go": (
        "package main\n\nimport (\n\t\"fmt\"\n\t\"sync\"\n)\n\nfunc main() {\n\tvar wg sync.WaitGroup\n"
        "\tfor i := 0; i < 4; i++ {\n\t\twg.Add(1)\n\t\tgo func("),
    "code.java": (
        "public final class Account {\n    private long balance;\n\n    public synchronized void "
        "deposit(long amount) {\n        if (amount <= 0) {\n"),
    "code.sql": (
        "SELECT c.name, COUNT(o.id) AS orders, SUM(o.total) AS revenue\nFROM customers c\nLEFT JOIN orders o "
        "ON o.customer_id = c.id\nWHERE o.created_at >= '2024-01-01'\nGROUP BY"),
    "code.shell": (
        "#!/bin/sh\nset -eu\n\nfor file in \"$@\"; do\n    if [ ! -f \"$file\" ]; then\n        echo \"$0: "
        "no such file: $file\" >&2\n"),
    "code.html": (
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n  <meta charset=\"utf-8\">\n  <title>Weather"
        "</title>\n  <style>\n    body { font-family: sans-serif; margin: 2em; }\n"),
    "code.json": (
        "{\n  \"name\": \"gloam\",\n  \"version\": \"1.2.0\",\n  \"dependencies\": {\n    \"express\": "
        "\"^4.18.2\",\n"),
    "code.haskell": "quicksort :: Ord a => [a] -> [a]\nquicksort [] = []\nquicksort (p:xs) =",
    "code.regex": "# Matches an ISO date such as 2024-02-29\nDATE = re.compile(r\"^(\\d{4})-(0[1-9]|1[0-2])-",
}

SCRIPTS = {
    "script.chinese": "北京是中华人民共和国的首都,也是全国的政治、文化中心。这座城市有三千多年的历史,",
    "script.japanese": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。何でも薄暗い",
    "script.korean": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 인간은",
    "script.arabic": "يولد جميع الناس أحراراً متساوين في الكرامة والحقوق، وقد وهبوا عقلاً وضميراً",
    "script.hebrew": "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.",
    "script.hindi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "script.russian": "Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива",
    "script.greek": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
    "script.thai": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
    "script.german": "Als Gregor Samsa eines Morgens aus unruhigen Träumen erwachte, fand er sich in seinem Bett",
    "script.french": "Longtemps, je me suis couché de bonne heure. Parfois, à peine ma bougie éteinte, mes yeux",
    "script.spanish": "En un lugar de la Mancha, de cuyo nombre no quiero acordarme, no ha mucho tiempo que vivía",
    "script.turkish": "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. Akıl ve vicdana",
    "script.vietnamese": "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền lợi.",
    "script.emoji": "Weekend plans: 🏖️ beach, 🍕 pizza & 🎬 movies! Who's in? 👍👨‍👩‍👧‍👦 🇫🇷🇯🇵",
    "script.mathematics": "∀ε>0 ∃δ>0: |x−a|<δ ⇒ |f(x)−f(a)|<ε. Then ∫₀¹ x² dx = 1/3 and ∑ 1/n² = π²/6, so",
}

CHATS = {
    "chat.question": [{"role": "user", "content": "What is the tallest mountain in Africa?"}],
    "chat.system": [
        {"role": "system", "content": "You are a terse assistant. Answer in one sentence."},
        {"role": "user", "content": "Why is the sky blue?"},
    ],
    "chat.turns": [
        {"role": "user", "content": "Give me a name for a black cat."},
        {"role": "assistant", "content": "How about Midnight?"},
        {"role": "user", "content": "Nice. And one for a white dog?"},
    ],
    "chat.code": [
        {"role": "user", "content": "Write a Python function that reverses the words of a sentence."}],
    "chat.translate": [{"role": "user", "content": "Translate to French: \"Where is the train station?\""}],
    "chat.list": [{"role": "user", "content": "List three uses of vinegar in the household, one per line."}],
}


def long_texts():
    """Name to text, each well above 2,048 tokens."""
    import argparse
    licence = pathlib.Path("/usr/share/common-licenses/GPL-3").read_text()
    return {"long.code": inspect.getsource(argparse)[4000:], "long.licence": licence}

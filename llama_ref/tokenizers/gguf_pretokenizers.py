"""How a byte-pair vocabulary of a GGUF file cuts a text into words, by the name in `tokenizer.ggml.pre`.

The names, and which expressions and flags belong to each, are those of llama.cpp (github.com/ggml-org/llama.cpp,
src/llama-vocab.cpp, of October 2026). A name's expressions are applied one after another, each to what the one before
left over and cut. Where llama.cpp quotes the expression that a model was published with and runs a substitute, because
std::regex lacks a feature, the published one stands here: it gives the ids that the model was trained on.
"""

from __future__ import annotations

from dataclasses import dataclass

from llama_ref.tokenizers.tiktoken_file import PATTERN as LLAMA_3

WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"  # GPT-2's
DIGIT = r"\p{N}"
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # of Llama 3's expression, after letters and digits
SLASHED_TAIL = TAIL.replace(r"[\r\n]*", r"[\r\n/]*", 1)
ONE_DIGIT = rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{TAIL}"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*")
TEKKEN = rf"{CASED[0]}|{CASED[1]}|\p{{N}}|{SLASHED_TAIL}"
GPT_4O = rf"{CASED[0]}{CONTRACTION}?|{CASED[1]}{CONTRACTION}?|\p{{N}}{{1,3}}|{SLASHED_TAIL}"
ASCII_WORDS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
DEEPSEEK_3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    ASCII_WORDS + r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
HAN_AND_KOREAN = "[一-龥\u0800-一가-\ud7ff]+"
CASED_LETTERS = (  # letters of scripts that have cases, as DeepSeek's first tokenizer lists them
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ"
    "-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
EAST_ASIAN = (
    "[一-\u9fff㐀-\u4dbf豈-\ufaff\u3040-ゟ゠-ヿ･-ﾟ⼀-\u2fdfเ-\u0e7f\u0e80-\u0effក-\u17ffက-႟ꩠ-ꩿꧠ-\ua9ff가-\ud7afᄀ-ᇿ]+"
)
QWEN_35 = (
    rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
EXAONE_MOE = (
    rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
SEED_CODER = (
    rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}"
    r"| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
JAIS_2 = (
    rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|"
    + "".join(rf"\s{{{count}}}(?!\S)|" for count in (512, 256, 128, 64, 32, 16, 8, 4, "1,2"))
    + r"\s{1}"
)
BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
DEEPSEEK = (
    r"[\r\n]",
    rf"\s?[{CASED_LETTERS}]+",
    "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
    r"\s+$",
    HAN_AND_KOREAN,
    r"\p{N}+",
)
DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", HAN_AND_KOREAN, DIGIT)
SPARK = (*DEEPSEEK_3[:2], ASCII_WORDS + r"| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+", DIGIT)
YOUTU = (
    "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥\u3040-ゟ゠-ヿ]+",
    GPT_4O.replace(r"\p{N}{1,3}", r"\p{N}"),
)
CHAMELEON = (
    *("<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", r"([\t\n]|    |  )"),
    *(DIGIT, r"[\p{P}!-/:-@\[-`{-~]", WORDS),
)
LINES = r"[^\n]+|[\n]+"
THREE_DIGITS = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"  # counted from the right: 1234567 -> 1 234 567
DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", WORDS, r"\p{N}+", "[0-9][0-9][0-9]")


@dataclass(frozen=True)
class Pretokenizer:
    """`whole_words`: a word that is a token is not put together by merges. `adds_bos`: unless the file says so."""

    expressions: tuple[str, ...]
    whole_words: bool = False
    adds_bos: bool = False


KNOWN: dict[str, Pretokenizer] = {
    "default": Pretokenizer(DEFAULT),
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano": Pretokenizer(
        (LLAMA_3,), whole_words=True, adds_bos=True
    ),
    "dbrx smaug-bpe chatglm-bpe": Pretokenizer((LLAMA_3,)),
    "glm4 glm5": Pretokenizer((LLAMA_3,), whole_words=True),
    "tekken": Pretokenizer((TEKKEN,), whole_words=True, adds_bos=True),
    "gpt-4o llama4 kanana2 talkie minimax-m2": Pretokenizer((GPT_4O,)),
    "tiny_aya cohere2moe": Pretokenizer((r"\d{1,3}(?=(?:\d{3})*\b)", GPT_4O)),
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": Pretokenizer((DIGIT, WORDS)),
    "gpt-2 phi-2 mpt olmo jais exaone4 gigachat a.x-4.0 mellum trillion granite-docling": Pretokenizer((WORDS,)),
    "jina-es jina-de jina-v2-es jina-v2-de modern-bert": Pretokenizer((WORDS,)),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2": Pretokenizer((ONE_DIGIT,)),
    "qwen35": Pretokenizer((QWEN_35,)),
    "ufakzeka": Pretokenizer((ONE_DIGIT.removeprefix(CONTRACTION + "|"),)),
    "laguna": Pretokenizer((LINES, ONE_DIGIT)),
    "minicpm5": Pretokenizer((r"\p{N}{1,3}", LLAMA_3.replace("{1,3}", "+")), whole_words=True),
    "jais-2": Pretokenizer((JAIS_2,)),
    "bailingmoe bailingmoe2 llada-moe": Pretokenizer((BAILING,)),
    "seed-coder": Pretokenizer((SEED_CODER,)),
    "exaone-moe": Pretokenizer((EXAONE_MOE,)),
    "deepseek-llm": Pretokenizer(DEEPSEEK),
    "deepseek-coder": Pretokenizer(DEEPSEEK_CODER),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": Pretokenizer(DEEPSEEK_3),
    "spark2_5": Pretokenizer(SPARK),
    "afmoe": Pretokenizer((THREE_DIGITS, EAST_ASIAN, DEEPSEEK_3[2])),
    "youtu": Pretokenizer(YOUTU, whole_words=True),
    "falcon": Pretokenizer((r"[\p{P}\$\+<=>\^~\|`]+", WORDS, "[0-9][0-9][0-9]")),
    "poro-chat bloom gpt3-finnish": Pretokenizer((BLOOM,)),
    "viking": Pretokenizer((BLOOM, DIGIT)),
    "superbpe": Pretokenizer((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    "chameleon": Pretokenizer(CHAMELEON, adds_bos=True),
}
PRETOKENIZERS = {name: pretokenizer for names, pretokenizer in KNOWN.items() for name in names.split()}

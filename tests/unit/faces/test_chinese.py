"""Chinese messages: every sentence of the source has one, every one has its sentence, and real commands speak it."""

import argparse
import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from errno import EACCES, EDQUOT, EISDIR, ENOENT, ENOSPC, ENOTDIR, EROFS
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticKnownError

import luthier
from luthier.faces.cli.chinese import Sentence, pad, read_table, say
from luthier.faces.cli.main import HELP, main
from tiny import tiny_model

SOURCE = Path(luthier.__file__).parent
TABLE = dict(read_table())

# Texts that stay English, and why.
EXEMPT_FILES = {
    "engine/calling.py": "answers over HTTP, for the tools of a request",
    "engine/marked.py": "answers over HTTP, for the tools of a request",
    "engine/formats.py": "answers over HTTP, for the tools of a request",
    "reporting/": "the page of a run",
    "faces/server/store.py": "SQL, and answers over HTTP",
    **{
        f"faces/server/{name}.py": "answers over HTTP, which programs read, as OpenAI's are in English"
        for name in (
            "access",
            "answered",
            "answering",
            "blocks",
            "bounds",
            "chat",
            "citing",
            "completions",
            "drawing",
            "engines",
            "finder",
            "hands",
            "holding",
            "indexes",
            "inputs",
            "items",
            "kept",
            "labelled",
            "limits",
            "metrics",
            "mistakes",
            "queries",
            "models",
            "refusals",
            "response",
            "responses",
            "searching",
            "shelf",
            "stores",
            "tokens",
            "wire",
            "worker",
            "app",
            "asking",
            "batches",
            "batching",
            "files",
            "following",
            "jobs",
            "orders",
            "pages",
            "rows",
            "tuning",
            "uploads",
            "within",
            "readings",
            "scoring",
        )
    },
}
NOTES = "a note in the record, which the page shows"
METHODS = "the name of a statistical method, in the record"
EXEMPT_CALLS = {
    "NotImplementedError": "for those who write a Part",
    "AttributeError": "for those who write Python",
    **dict.fromkeys(("make_parser", "add_argument", "add_argument_group", "Field"), "the --help of one command"),
}
EXEMPT = {
    r"^([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) \S+ [1-9]\d* *(.*)$": "what lines of /proc look like",
    "model name": "a key of /proc/cpuinfo",
    "Bearer {}": "a header of HTTP",
    "HTTP {}": "a name and a number",
    "no tokenizer - can't validate <[": "what llguidance says, which is not shown",
    "HTTP {}, {}": "the same, and what a server says",
    "{} at {}": "a server, in the record",
    "{} is no kind of row": "for those who write a Part",
    "{}, form={}": "how a layer is printed in Python",
    "{}, {} MB": "a unit",
    "{} MB": "a unit",
    "can't allocate memory": "what torch says",
    "{} of {} rows": "a table in memory, from Python only",
    "Label .* is present in all training examples": "a pattern for scikit-learn's warning",
    r"{} ?[[\p{L}\p{M}]&&[^\p{Han}]]+": "a pattern",
    "SMS Spam Collection (Almeida and Gomez Hidalgo; UCI; CC BY 4.0)": "a name and a licence",
    "'classify' or 'regress'": "names; their `or` has its own entry",
    "{} GB": "a unit",
    "hub               {}: {}": "names",
    "luthier {}": "the program's name",
    "luthier serve": "a command",
    "scores with a bias are not for the kernel": "caught where it is raised for",
    "not ready": "a state, which programs read",
    '{} -H "Authorization: Bearer $LUTHIER_KEY"': "a part of a command",
    '{"model": "{}", "messages": [{"role": "user", "content": "Hello"}]}': "the same",
    "curl {}/v1/chat/completions{} -H 'Content-Type: application/json' -d '{}'": "a command",
    "luthier: {}": "the program's name",
    "{} of {} answers: {}": "a Python warning of `inference`",
    'generate run:{} "some text"': "a command",
    "evaluate run:{} --data FILE": "a command",
    'luthier generate run:{} "Your parcel is waiting, pay 2.99 here"': "a command",
    "luthier evaluate run:{} --data FILE.jsonl": "a command",
    "luthier tune --model mini --data YOUR.jsonl": "a command",
    "precision, recall and f1 are those of {}, the rarer of the two classes": NOTES,
    "no ROC-AUC for {}: these rows hold only one kind": NOTES,
    "ROC-AUC needs items of both kinds": NOTES,
    "no {}: one side is constant, or there are fewer than three rows": NOTES,
    "perplexity is per token of this tokenizer; bits_per_byte compares between tokenizers": NOTES,
    "{} of {} answers are empty": NOTES,
    "{} goes by log p gained over the model at the start; {} by mean log p": NOTES,
    "no ROC-AUC: these rows hold only one kind": NOTES,
    "chosen ({}): {}": "an input in the record, which the page shows",
    "{}rejected ({}): {}": "the same",
    "answer ({}): {}": "the same",
    r"\n\n(Human|Assistant):[ \n]?": "a pattern",
    "mean of DeLong, one class against the rest": METHODS,
    "Fisher z": METHODS,
    "Fisher z, Bonett and Wright": METHODS,
    "bootstrap, {} resamples": METHODS,
    "{}, tokenize {}": METHODS,
    "{} of sentence scores": METHODS,
    "Hey, are we still on for lunch tomorrow at noon?": "a text to classify",
    "WINNER! You have been selected for a 1000 pound prize. Call 09061701461 now to claim. T&Cs apply.": "the same",
    "Sorry I missed your call, I was in a meeting. Ring you tonight.": "the same",
    "The naïve café costs 3.50 € —  don’t pay 12,345!": "a text to render",
    "Prices in 2026: one, two, three.": "the same",
    "Answer briefly.": "the same",
    "Thank you! 谢谢！": "the same",
    "You are welcome. 不客气。": "the same",
    "Answer the question from the numbered passages alone. After each statement cite its passage as [1]. If the passages do "
    "not answer the question, say: {unknown}": "what a model is asked",
    "请只根据下面编号的资料回答问题，并在每个论断后用 [1] 的形式注明出处。如果资料中没有答案，请回答：{unknown}": "the same",
    "Question: {}": "the same",
    "I do not know.": "an answer, in the language of the question",
    "{}, page {}": "where a passage stands, in rows too",
    "{}, line {}": "the same",
    "{}, lines {}-{}": "the same",
    "{} halves of sentences against the other files": "a note in the index",
    "{} questions of {}": "the same; an error that begins with it has its own entry",
    "address article aside blockquote br dd div dl dt fieldset figcaption figure header hr li main ol p pre section "
    "table": "names of elements",
    "Which of these labels fits the text: {}? Answer with the label alone.": "what a model is asked",
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. Note that the answer can "
    'only be "{}" or "{}".': "the same",
    "<Instruct>: {instruction}": "the same",
    "<Query>: {query}": "the same",
    "<Document>: {document}": "the same",
    "Given a web search query, retrieve relevant passages that answer the query": "the same",
}


def wordings(node: ast.AST) -> list[str]:
    """Every wording of an expression of strings, `{}` where something is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        return ["".join(parts) for parts in product(*map(wordings, node.values))]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return ["".join(parts) for parts in product(wordings(node.left), wordings(node.right))]
    if isinstance(node, ast.IfExp):
        return wordings(node.body) + wordings(node.orelse)
    if isinstance(node, ast.FormattedValue) and node.conversion == -1 and isinstance(node.value, ast.IfExp | ast.BinOp):
        return wordings(node.value)
    return ["{}"]


def templates(node: ast.AST) -> Iterator[str]:
    """The templates of all strings below `node`, line by line; docstrings and what is exempt are left out."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return
    if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in EXEMPT_CALLS:
        return
    if (said := wordings(node)) != ["{}"]:
        for wording in said:
            for line in wording.split("\n"):
                # One space at an edge, or a separator in front: a piece that goes on from what is filled in.
                line = re.sub(r"^(?= \S|; |, )", "{}", line)
                line = re.sub(r"(?<=\S) $", " {}", line)
                yield re.sub(r"(\{\})+", "{}", line.strip())
        yield from _inside(node)
        return
    for child in ast.iter_child_nodes(node):
        yield from templates(child)


def _inside(node: ast.AST) -> Iterator[str]:
    """The templates of what is filled into a string, which are sentences of their own."""
    for child in ast.iter_child_nodes(node):
        piece = isinstance(child, ast.Constant) and isinstance(node, ast.JoinedStr | ast.BinOp | ast.IfExp)
        if isinstance(child, ast.JoinedStr | ast.BinOp | ast.IfExp | ast.FormattedValue):
            yield from _inside(child)
        elif not piece:
            yield from templates(child)


@cache
def collect() -> dict[str, str]:
    """Each template of the source, and where it stands."""
    found: dict[str, str] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE).as_posix()
        if not name.startswith(tuple(EXEMPT_FILES)):
            for one in templates(ast.parse(path.read_text(encoding="utf-8"))):
                found.setdefault(one, name)
    return found


def is_sentence(template: str) -> bool:
    """Whether a template is made of words; the source of a chat template is not."""
    return " " in template and "{%" not in template and bool(re.search("[A-Za-z]{2}", template.replace("{}", "")))


def sayings_of_others() -> list[str]:
    """What libraries and the system say inside our sentences, provoked."""
    kinds: dict[str, dict[str, object] | None] = dict.fromkeys(
        ("int_type", "int_parsing", "int_from_float", "float_type", "float_parsing", "finite_number", "bool_type")
    )
    kinds |= dict.fromkeys(("bool_parsing", "string_type", "list_type", "tuple_type", "dict_type"))
    kinds |= {"greater_than": {"gt": 0}, "greater_than_equal": {"ge": 0}, "less_than": {"lt": 1}}
    kinds |= {"less_than_equal": {"le": 1}, "literal_error": {"expected": "'a'"}, "model_type": {"class_name": "Split"}}
    said = [PydanticKnownError(kind, context).message() for kind, context in kinds.items()]  # type: ignore[arg-type]
    try:
        TypeAdapter(Path).validate_python([])
    except ValidationError as err:
        said.append(err.errors()[0]["msg"])
    said = [one[:1].lower() + one[1:] for one in said]
    for text in ("", "[1 2]", '{"a" 1}', "{a", "1 2", '"a', '"\n"', '"\\x"'):
        with pytest.raises(json.JSONDecodeError) as mistake:
            json.loads(text)
        said.append(mistake.value.msg)
    for text in ("a: b: c", "a\nb: [", "- a\nb: 1", "[1", "{a", "'a", "*a", '"\\q"', "\ta", "a: 1\nbc\nd: 1"):
        with pytest.raises(yaml.YAMLError) as broken:
            yaml.safe_load(text)
        said.append(str(broken.value.problem))  # type: ignore[attr-defined]
    said += [os.strerror(code) for code in (ENOENT, EACCES, EISDIR, ENOTDIR, EROFS, ENOSPC, EDQUOT)]
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--number", type=int)
    parser.add_argument("--flag", action="store_true")
    for words in (["--number"], ["--number", "x"], ["--flag=1"]):
        with pytest.raises(argparse.ArgumentError) as wrong:
            parser.parse_args(words)
        said += [str(wrong.value), wrong.value.message]
    return [*said, "the following arguments are required: model"]


def test_every_sentence_of_the_source_has_its_chinese():
    lost = {
        one: where for one, where in collect().items() if is_sentence(one) and one not in TABLE and one not in EXEMPT
    }
    assert not lost, "write these into messages.zh.txt, or into EXEMPT with a reason"


def test_every_entry_has_its_sentence():
    others = sayings_of_others()
    strange = [one for one in TABLE if one not in collect() and re.search("[a-z]", one)]
    stale = [one for one in strange if not any(list(Sentence(one, "").readings(word)) for word in others)]
    assert not stale, "these stand in messages.zh.txt and nowhere else"
    assert not [one for one in EXEMPT if one not in collect()], "these are exempt and stand nowhere"


def test_the_table_is_sound():
    entries = [english for english, _ in read_table()]
    assert len(entries) == len(set(entries)), "an entry stands twice"
    for english, chinese in TABLE.items():
        places = re.findall(r"\{(\d+)\}", chinese)
        assert sorted(map(int, places)) == list(range(english.count("{}"))), english
        assert re.search("[\u3000-\u9fff\uff00-\uffef]", chinese), english


def test_every_template_finds_its_own_entry(monkeypatch):
    monkeypatch.setenv("LUTHIER_LANG", "zh")
    for english, chinese in TABLE.items():
        if re.search("[a-z]", english):
            pieces = english.split("{}")
            filled = "".join(f"{piece}n{at}" for at, piece in enumerate(pieces[:-1])) + pieces[-1]
            assert say(filled) == re.sub(r"\{(\d+)\}", r"n\1", chinese)


@pytest.mark.parametrize(
    ("english", "chinese"),
    [
        ("tune: a.b: input should be greater than 0 (got -1)", "tune：a.b：应大于 0（实际为 -1）"),
        (
            "run.yaml:\n  line 3: rte: no such setting; did you mean 'rate' or 'ratio'?\n  model: is required",
            "run.yaml:\n  第 3 行：rte：没有这项设置；是否想写 'rate' 或 'ratio'？\n  model：必须给出",
        ),
        (
            "3 of 9 rows cannot be used: a.jsonl:1: text is empty; a.jsonl:2: label is missing; and 1 more. "
            "Mend them, or set data.on_bad_row: drop",
            "9 行中有 3 行无法使用：a.jsonl:1：text 为空；a.jsonl:2：缺少 label；另有 1 行。"
            "请修正这些行，或设置 data.on_bad_row: drop",
        ),
        (
            "stop: step 9 (no better validation for 3 in a row; best was step 4)",
            "stop：第 9 步（验证结果连续 3 次没有改善；最佳为第 4 步）",
        ),
        ("warning: 3 x a sentence that nobody knows", "警告（3 处）：a sentence that nobody knows"),
        (
            "evaluate: line 3: sampling: top_k has no effect at temperature 0, where nothing is drawn; "
            "set temperature above 0",
            "evaluate：第 3 行：sampling：temperature 为 0 时不作采样，top_k 不起作用；请将 temperature 设为大于 0 的值",
        ),
        ("3 x to do", "3 x to do"),
        ("5 min ago", "5 分钟前"),
        ("row 3: expected a dict or a text, found a int", "第 3 行：应为字典或文本，实际是 int"),
        ("nobody: knows this; or that (at all)", "nobody: knows this; or that (at all)"),
    ],
)
def test_sentences_within_sentences(english, chinese, monkeypatch):
    monkeypatch.setenv("LUTHIER_LANG", "zh")
    assert say(english) == chinese
    monkeypatch.setenv("LUTHIER_LANG", "en")
    assert say(english) == english


def test_a_long_text_of_others_costs_little(monkeypatch):
    monkeypatch.setenv("LUTHIER_LANG", "zh")
    for text in ("a.py: " * 2000, "word; and (more) or less: " * 200):
        assert say(text) == text


@pytest.mark.parametrize(
    ("settings", "chinese"),
    [
        ({"LANG": "zh_CN.UTF-8"}, True),
        ({"LC_MESSAGES": "zh_TW.UTF-8", "LANG": "en_US.UTF-8"}, True),
        ({"LC_ALL": "C.UTF-8", "LANG": "zh_CN.UTF-8"}, False),
        ({"LUTHIER_LANG": "en", "LC_ALL": "zh_CN.UTF-8"}, False),
        ({"LUTHIER_LANG": "zh", "LC_ALL": "en_US.UTF-8"}, True),
        ({}, False),
    ],
)
def test_the_environment_decides(settings, chinese, monkeypatch):
    for name in ("LUTHIER_LANG", "LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert (say("saving the model") == "保存模型") is chinese


def test_a_terminal_that_cannot_write_chinese_gets_english():
    done = run_luthier("--help", LUTHIER_LANG="zh", PYTHONIOENCODING="latin-1")
    assert done.stdout == HELP


def test_chinese_characters_take_two_cells():
    assert pad("本模型", 12) == "本模型      " and pad("this model", 12) == "this model  "


def run_luthier(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1", **environment}
    words = [sys.executable, "-m", "luthier", *arguments]
    return subprocess.run(words, capture_output=True, text=True, encoding="utf-8", env=settings, check=False)


def test_help_is_chinese_for_the_chinese_and_imports_nothing_for_others():
    assert "微调模型" in run_luthier("--help", LUTHIER_LANG="zh").stdout
    assert run_luthier("--help", LUTHIER_LANG="en", LC_ALL="zh_CN.UTF-8").stdout == HELP
    code = (
        "import sys; from luthier.faces.cli import chinese, main; main.main(['--help']); "
        "print([name for name in ('torch', 'yaml', 'rich', 'pydantic') if name in sys.modules], "
        "chinese._sentences.cache_info().misses)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PATH": ""})
    assert done.stdout.endswith("[] 0\n")


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.jsonl").write_text('{"text": "a", "label": "x"}\n{"text": \n', encoding="utf-8")
    (tmp_path / "run.yaml").write_text(
        "model: mini\ndata: rows.jsonl\nlerning_rate: 1e-3\nsteps: -1\n", encoding="utf-8"
    )
    rows = [{"text": f"{word} number {at}", "label": word[:3]} for at in range(4) for word in ("win it", "see you")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return tmp_path


MISTAKES = [
    (["tun"], "luthier: 没有命令 'tun'；是否想写 'tune'？"),
    (["tune"], "tune 需要一个 YAML 文件"),
    (["tune", "--data", "x", "--learnig-rate", "3"], "没有参数 --learnig-rate；是否想写 '--learning-rate'"),
    (["tune", "run.yaml"], "第 3 行：lerning_rate：没有这项设置；是否想写 'learning_rate'？"),
    (["tune", "run.yaml"], "第 4 行：steps：应大于 0（实际为 -1）"),
    (["tune", "--data", "nowhere.jsonl"], "nowhere.jsonl：没有这个文件；请检查路径"),
    (
        ["tune", "--data", "broken.jsonl"],
        "2 行中有 1 行无法使用：broken.jsonl:2：第 10 列处 JSON 有误：此处应有一个值。",
    ),
    (["tune", "--data", "rows.jsonl", "--model", "no/such"], "no/such：本地缓存中没有，而 HF_HUB_OFFLINE 禁止访问 hub"),
    (["tune", "--data", "rows.jsonl", "--model", "./nosuch"], "nosuch：没有这个目录；请给出目录"),
    (["tune", "--data", "rows.jsonl", "--set", "optimizer=adm"], "未知的 optimizer 'adm'；是否想写 'adam'"),
    (["evaluate"], "evaluate：缺少必需的参数：model；可用参数见 luthier evaluate --help"),
    (["report", "run:none"], "中没有这次运行；目前还没有任何运行"),
    (["schema", "tun"], "没有命令 'tun'；是否想写 'tune'？"),
]


@pytest.mark.parametrize(("arguments", "part"), MISTAKES)
def test_mistakes_in_chinese(arguments, part, workplace, monkeypatch, capsys):
    monkeypatch.setenv("LUTHIER_LANG", "zh")
    assert main(arguments) == 2
    assert part in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "part"), MISTAKES)
def test_the_same_mistakes_in_english(arguments, part, workplace, monkeypatch, capsys):
    monkeypatch.setenv("LUTHIER_LANG", "en")
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert not re.search("[\u3000-\u9fff\uff00-\uffef]", said) and "luthier: " in said


def english_sentences(text: str) -> list[str]:
    """Runs of four English words or more; names, numbers and commands are shorter."""
    return re.findall(r"[A-Za-z]+(?: [A-Za-z]+){3,}", text)


def test_a_tuning_in_chinese(workplace):
    model = str(tiny_model("bert"))
    flags = ["--data", "rows.jsonl", "--no-baselines", "--set", "data.split.validation=0.25", "--name", "one"]
    done = run_luthier("tune", "--model", model, *flags, "--set", "steps=2", LUTHIER_LANG="zh", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert not english_sentences(done.stderr), done.stderr
    for part in (
        "读取数据 ...",
        f"加载模型 {model} ...",
        "objective：classify（数据行带有标签）",
        "第 2/2 步  损失",
        "保存模型 ...",
    ):
        assert part in done.stderr
    assert (
        "本模型      " in done.stdout and "run:one 保存在" in done.stdout and "接下来：luthier generate" in done.stdout
    )
    events = (workplace / "runs" / "one" / "events.jsonl").read_text(encoding="utf-8")
    record = (workplace / "runs" / "one" / "record.json").read_text(encoding="utf-8")
    assert "the rows carry labels" in record and not re.search("[\u4e00-\u9fff]", record + events), "files stay English"
    assert "已完成" in run_luthier("runs", LUTHIER_LANG="zh").stdout
    assert not re.search("[\u4e00-\u9fff]", run_luthier("runs", "--json", LUTHIER_LANG="zh").stdout)


def test_doctor_in_chinese(workplace, monkeypatch, capsys):
    monkeypatch.setenv("LUTHIER_LANG", "zh")
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "机器        " in said and "运行目录    " in said and "可写" in said
    assert "微调和评测所需的一切均已就绪。" in said or "GB 空间" in said

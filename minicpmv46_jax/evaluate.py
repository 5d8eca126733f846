"""Scores a model on questions with known answers: `python -m minicpmv46_jax.evaluate FILE --model FOLDER`.

A line of the file is one question, an object:

    {"images": ["cat.png"], "question": "What is this?", "answers": ["A cat."], "group": "animals"}

`image` and `video`, or `images` and `videos`, are URLs or paths relative to the file's folder. Instead of a
question and media, `messages` may hold a whole conversation in OpenAI's form. `answers` are all correct
answers. Optional keys: `id`, `group`, `tools`, and `options` such as {"max_slice_nums": 4, "enable_thinking":
true}. Decoding is greedy. With `--url http://127.0.0.1:8000/v1`, a running server answers, of this project or
another, instead of the plain generator.

Scores: "exact" is 1 if the answer equals a correct one up to white space. ANLS is the edit similarity to the
nearest correct answer, and 0 below a half (arXiv:1907.00490). Thoughts are removed first.
"""

import argparse
import base64
import json
import mimetypes
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from minicpmv46_jax.library import MiniCPMV

FIELDS = frozenset("id group image images video videos question messages answers tools options".split())
MIN_SIMILARITY = 0.5  # lower similarities count as 0 in ANLS
MAX_NEW_TOKENS = 512
CONCURRENCY = 16  # concurrent requests to a server
TIMEOUT_S = 600.0  # for one answer of a server
THOUGHT_END = "</think>"


@dataclass(frozen=True)
class Question:
    """A question of an evaluation.

    Attributes:
      id: its id in the file, or "line N".
      messages: messages as `processing.Processor` takes them.
      answers: all correct answers.
      group: the group that its score counts in.
      tools: functions on offer.
      options: options of the processor and the chat template.
    """

    id: str
    messages: Sequence[Mapping[str, Any]]
    answers: Sequence[str]
    group: str = "all"
    tools: Sequence[Mapping[str, Any]] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoredAnswer:
    """An answer with its scores: `exact` is 0 or 1, `anls` is 0 to 1."""

    question: Question
    answer: str
    exact: float
    anls: float


Answerer = Callable[[Question], str]


def read_questions(path: Path) -> list[Question]:
    """Reads a file of questions.

    Raises:
      ValueError: a line is not a question, or there is none; the message names file and line.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [_question(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise ValueError(f"{path}: the file has no questions")
    return found


def _question(line: str, path: Path, number: int) -> Question:
    where = f"{path}, line {number}"
    try:
        raw = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: expected an object, got {type(raw).__name__}")
    if unknown := sorted(raw.keys() - FIELDS):
        raise ValueError(f"{where}: field {unknown[0]!r} is unknown; known are {', '.join(sorted(FIELDS))}")
    answers = raw.get("answers")
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"{where}: answers must be a list of texts, at least one, got {answers!r}")
    messages = raw.get("messages") or _user_messages(raw, path.parent, where)
    name, group = str(raw.get("id", f"line {number}")), str(raw.get("group", "all"))
    return Question(name, messages, answers, group, raw.get("tools") or (), raw.get("options") or {})


def _user_messages(raw: Mapping[str, Any], folder: Path, where: str) -> list[dict[str, Any]]:
    """Returns one user message: the media, then the question."""
    if not isinstance(raw.get("question"), str):
        raise ValueError(f"{where}: question must be a text, got {raw.get('question')!r}; or give messages")
    parts: list[dict[str, Any]] = []
    for kind in ("image", "video"):
        sources = [*([raw[kind]] if kind in raw else []), *raw.get(f"{kind}s", [])]
        parts += [{"type": kind, kind: _source(source, folder, where)} for source in sources]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": raw["question"]}]}]


def _source(source: Any, folder: Path, where: str) -> str:
    if not isinstance(source, str):
        raise ValueError(f"{where}: a picture or video must be a path or URL, got {source!r}")
    if source.startswith(("http://", "https://", "data:")):
        return source
    if not (folder / source).is_file():
        raise ValueError(f"{where}: {folder / source} does not exist")
    return str(folder / source)


def model_answerer(model: MiniCPMV, max_new_tokens: int = MAX_NEW_TOKENS) -> Answerer:
    """Returns a function that answers questions greedily with the plain generator."""

    def answer(question: Question) -> str:
        tools = list(question.tools) or None
        return model.chat(question.messages, tools=tools, temperature=0.0, max_new_tokens=max_new_tokens, **question.options)

    return answer


def server_answerer(url: str, name: str | None = None, max_new_tokens: int = MAX_NEW_TOKENS) -> Answerer:
    """Returns a function that answers questions greedily through a server's OpenAI chat completions.

    Args:
      url: the base URL, up to and including /v1.
      name: the model's name; None for the first that the server lists.
      max_new_tokens: bound of an answer.

    Raises:
      ValueError: the server cannot be reached or rejects a request; the message has the server's text.
    """
    client = httpx.Client(base_url=url.rstrip("/") + "/", timeout=TIMEOUT_S)
    name = name or _request_json(client, "GET", "models")["data"][0]["id"]

    def answer(question: Question) -> str:
        options = dict(question.options)
        template = {"enable_thinking": options.pop("enable_thinking")} if "enable_thinking" in options else {}
        body = {
            "model": name,
            "messages": [_for_api(message) for message in question.messages],
            "temperature": 0.0,
            "max_tokens": max_new_tokens,
            "mm_processor_kwargs": options,
            "chat_template_kwargs": template,
        }
        body |= {"tools": list(question.tools)} if question.tools else {}
        message = _request_json(client, "POST", "chat/completions", json=body)["choices"][0]["message"]
        calls = "\n".join(_call_text(call["function"]) for call in message.get("tool_calls") or [])
        return "\n\n".join(filter(None, [message.get("content"), calls]))

    return answer


def _request_json(client: httpx.Client, method: str, path: str, **fields: Any) -> dict[str, Any]:
    try:
        reply = client.request(method, path, **fields)
    except httpx.HTTPError as error:
        raise ValueError(f"{client.base_url}: the server cannot be reached: {error}") from None
    if reply.status_code != httpx.codes.OK:
        raise ValueError(f"{client.base_url}{path}: status {reply.status_code}: {reply.text}")
    return reply.json()


def _for_api(message: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a message in the API's form: media are URLs, and files become data URLs."""
    content = message.get("content")
    if isinstance(content, str) or content is None:
        return dict(message)
    return {**message, "content": [_part_for_api(part) for part in content]}


def _part_for_api(part: Mapping[str, Any]) -> dict[str, Any]:
    kind = part["type"]
    if kind not in ("image", "video"):
        return dict(part)
    source = part[kind]
    if not source.startswith(("http://", "https://", "data:")):
        media_type = mimetypes.guess_type(source)[0] or f"{kind}/*"
        source = f"data:{media_type};base64,{base64.b64encode(Path(source).read_bytes()).decode()}"
    return {"type": f"{kind}_url", f"{kind}_url": {"url": source}}


def _call_text(function: Mapping[str, Any]) -> str:
    """Returns a function call in the notation that the model writes."""
    arguments = json.loads(function["arguments"])
    body = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={function['name']}>\n{body}</function>\n</tool_call>"


def evaluate(
    questions: Sequence[Question], answer: Answerer, concurrency: int = 1, progress: bool = False
) -> Iterator[ScoredAnswer]:
    """Yields each question's scored answer, in order.

    Args:
      questions: the questions.
      answer: answers one question.
      concurrency: number of questions answered at the same time.
      progress: True to draw a progress bar.
    """
    with ThreadPoolExecutor(concurrency) as pool:
        answers: Iterable[str] = pool.map(answer, questions) if concurrency > 1 else map(answer, questions)
        bar = tqdm(answers, total=len(questions), unit="answer", disable=None if progress else True)
        for question, text in zip(questions, bar, strict=True):
            yield score(question, text)


def score(question: Question, answer: str) -> ScoredAnswer:
    """Returns an answer's scores, with thoughts removed and white space normalised."""
    text = _normalize_spaces(answer.rpartition(THOUGHT_END)[2])
    correct = [_normalize_spaces(one) for one in question.answers]
    return ScoredAnswer(question, answer, float(text in correct), max(anls(text, one) for one in correct))


def anls(answer: str, correct: str) -> float:
    """Returns the average normalised Levenshtein similarity of one pair, ignoring case.

    It is 1 for equal texts, and 0 below a similarity of a half.
    """
    a, b = answer.lower(), correct.lower()
    similarity = 1 - levenshtein(a, b) / max(len(a), len(b), 1)
    return similarity if similarity >= MIN_SIMILARITY else 0.0


def levenshtein(a: str, b: str) -> int:
    """Returns the least number of insertions, deletions and replacements of a letter from `a` to `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
    return row[-1]


def _normalize_spaces(text: str) -> str:
    return " ".join(text.split())


def report(scored: Sequence[ScoredAnswer]) -> str:
    """Returns a table of the number of questions, exact share and mean ANLS of each group and of all."""
    groups: dict[str, list[ScoredAnswer]] = {}
    for one in scored:
        groups.setdefault(one.question.group, []).append(one)
    rows = [(name, *_means(groups[name])) for name in sorted(groups)]
    rows += [("all questions", *_means(scored))] if len(groups) > 1 else []
    width = max(len(name) for name, *_ in rows)
    lines = [f"| {name:<{width}} | {number:9d} | {exact:7.1%} | {anls:6.3f} |" for name, number, exact, anls in rows]
    return "\n".join([f"| {'group':<{width}} | questions | exact   | ANLS   |", f"|{'-' * (width + 2)}|---|---|---|", *lines])


def _means(scored: Sequence[ScoredAnswer]) -> tuple[int, float, float]:
    number = len(scored)
    return number, sum(one.exact for one in scored) / number, sum(one.anls for one in scored) / number


def result_row(scored: ScoredAnswer) -> dict[str, Any]:
    """Returns a line of the results file."""
    question = scored.question
    return {
        "id": question.id,
        "group": question.group,
        "answers": list(question.answers),
        "answer": scored.answer,
        "exact": scored.exact,
        "anls": scored.anls,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, or 1 for a user's mistake (one line on stderr)."""
    args = _parser().parse_args(arguments)
    try:
        if (args.model is None) == (args.url is None):
            raise ValueError("give either --model or --url")
        questions = read_questions(args.questions)[: args.limit]
        answer = server_answerer(args.url, args.name, args.max_new_tokens) if args.url else _local(args)
        scored = list(evaluate(questions, answer, CONCURRENCY if args.url else 1, progress=True))
        if args.out is not None:
            lines = [json.dumps(result_row(one), ensure_ascii=False) + "\n" for one in scored]
            args.out.write_text("".join(lines), encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report(scored))
    return 0


def _local(args: argparse.Namespace) -> Answerer:
    return model_answerer(MiniCPMV.from_pretrained(args.model, dtype=args.dtype, progress=True), args.max_new_tokens)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m minicpmv46_jax.evaluate", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("questions", type=Path, metavar="FILE", help="JSONL file of one question a line")
    parser.add_argument("--model", metavar="FOLDER_OR_ID", help="checkpoint folder or hub id that the plain generator runs")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="dtype of the weights (default: the checkpoint's)")
    parser.add_argument("--url", help="base URL of a server to ask, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--name", help="name of the server's model (default: the first)")
    parser.add_argument("--max-new-tokens", type=int, default=MAX_NEW_TOKENS, help="bound of an answer (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="ask only the first N questions", metavar="N")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write every answer with its scores to this JSONL file")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""Data and scores of the tasks beside it, which lm-eval lacks."""

import ast
import operator
import re
from fractions import Fraction
from pathlib import Path

from datasets import DatasetDict, load_dataset

NUMBER = re.compile(r"-?\d+\(\d+/\d+\)%?|-?\(?\d+/\d+\)?%?|-?\d+(?:\.\d+)?%?")
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def load_ape210k(**_) -> DatasetDict:
    """Splits train and test with question, equation and answer: of the folder extra/ape210k, or of the Hub's copy."""
    if Path("extra/ape210k").is_dir():
        return load_dataset("extra/ape210k")
    data = load_dataset("MU-NLPC/Calc-ape210k", "original-splits")
    data = data.select_columns(["question_chinese", "equation", "result"])
    return data.rename_columns({"question_chinese": "question", "result": "answer"})


def value(text: str) -> Fraction | None:
    """The value of an answer: 45, -3.5, 25%, (11/20), the mixed number 1(5/6), 4.2/3.1; else of its last number."""
    text = text.replace(",", "").strip()
    for candidate in (text, *NUMBER.findall(text)[-1:]):
        plain = re.sub(r"(\d+)(\(\d+/\d+\))", r"(\1+\2)", candidate)
        plain = re.sub(r"(\d[\d.]*|\([^()]*\))%", r"(\1/100)", plain)
        if not re.fullmatch(r"[\d.+\-*/() ]+", plain):
            continue
        try:
            return arithmetic(ast.parse(plain, mode="eval").body, plain)
        except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
            continue
    return None


def arithmetic(node: ast.expr, source: str) -> Fraction:
    """The value of numbers and + - * / alone. Raises ValueError for anything else."""
    if isinstance(node, ast.Constant):
        return Fraction(ast.get_source_segment(source, node))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -arithmetic(node.operand, source)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](arithmetic(node.left, source), arithmetic(node.right, source))
    raise ValueError(f"{source} is more than numbers and + - * /.")


def score_number(doc: dict, results: list[str]) -> dict[str, int]:
    """Whether the value after 答案： is the answer's; a text without 答案： counts by its last number."""
    solution = results[0]
    if "答案：" in solution:
        solution = solution.split("答案：")[1].strip().split("\n")[0]
    given = value(solution)
    return {"exact_match": int(given is not None and given == value(doc["answer"]))}


def alternatives(text: str) -> set[str]:
    """What stands in the last double brackets, without white space and case, cut at "or" between values."""
    found = re.findall(r"\[\[(.*?)\]\](?!\])", text, re.DOTALL)
    bare = re.sub(r"\s+", "", found[-1]).lower() if found else ""
    return set(re.split(r"(?<=[\d})])or(?=[-\d\\({])", bare)) - {""}


def score_brackets(doc: dict, results: list[str]) -> dict[str, int]:
    """Whether the text's last [[…]] is the answer's; the values of [[1or2]] may be in any order."""
    expected = alternatives(doc["answer"])
    return {"exact_match": int(bool(expected) and alternatives(results[0]) == expected)}

"""llguidance beside xgrammar on one vocabulary: start, compilation, masks, and what bad grammars do.

    python -m venv xg && xg/bin/pip install torch==2.13.0 xgrammar==0.1.34 llguidance==1.9.1
    PYTHONPATH=tests:<directory with cabochon> xg/bin/python benchmarks/grammar_engines.py DIR --out FILE

DIR has a tokenizer.json. xgrammar is no dependency of ours, so this needs an environment of its own. Each
case is a process of its own with 60 s; times are of its CPU, all threads together, which other programs on
the machine hardly change. Masks: a random walk of at most 200 tokens, the same seeds for both.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from json_schemas import SCHEMAS

VOCAB_SIZE = 262_144
EOS_IDS = [1, 106]
STEPS = 200
TIMEOUT_S = 60
NODE = {
    "type": "object",
    "properties": {"v": {"type": "integer"}, "next": {"type": "array", "items": {"$ref": "#"}}},
    "required": ["v"],
}
PROPERTIES = {f"p{i}": {"type": "string", "maxLength": 10} for i in range(1000)}
CHAIN = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(5000)} | {"d5000": {"type": "null"}}
NESTED = '{"type":"array","minItems":1,"items":'


def rules(lines: list[str]) -> dict[str, str]:
    """The same grammar in both dialects."""
    return {"lark": "\n".join(lines).replace("root", "start"), "ebnf": "\n".join(lines).replace(":", "::=")}


BAD: dict[str, tuple[str, Any]] = {
    "refers to itself alone": ("json", {"$ref": "#"}),
    "recursive": ("json", NODE),
    "20,000 choices": ("rules", rules(["root: " + " | ".join(f'"{i}"' for i in range(20_000))])),
    "enum of 15,000": ("json", {"enum": [f"value {i}" for i in range(15_000)]}),
    "(a{1000}){1000}": ("regex", "(a{1000}){1000}"),
    "nested 30 deep": ("json", NESTED * 30 + '{"type":"null"}' + "}" * 30),
    "nested 3,000 deep": ("json", NESTED * 3000 + '{"type":"null"}' + "}" * 3000),
    "1,000 properties": (
        "json",
        {"type": "object", "properties": PROPERTIES, "required": list(PROPERTIES)},
    ),
    "minimum above maximum": ("json", {"type": "integer", "minimum": 5, "maximum": 1}),
    "conflicting const": ("json", {"const": 1, "type": "string"}),
    "remote reference": ("json", {"$ref": "https://example.com/schema.json"}),
    "multipleOf 9,999,991": ("json", {"type": "integer", "multipleOf": 9_999_991}),
    "chain of 5,000 references": ("json", {"$defs": CHAIN, "$ref": "#/$defs/d0"}),
    "chain of 9,000 rules": (
        "rules",
        rules(["root: a0", *(f"a{i}: a{i + 1}" for i in range(9000)), 'a9000: "x"']),
    ),
}


class LLGuidance:
    """As we use it, without the limits of our processes."""

    def __init__(self, directory: Path) -> None:
        from cabochon.engine.grammar import read_vocabulary  # optional: each engine loads only itself

        self._trie = read_vocabulary(directory, VOCAB_SIZE, EOS_IDS).trie

    def compile(self, kind: str, content: Any) -> Any:
        from llguidance import LLMatcher

        from cabochon.engine.grammar import JSON_OPTIONS, LIMITS

        match kind:
            case "json":
                text = content if isinstance(content, str) else json.dumps(content)
                source = LLMatcher.grammar_from_json_schema(text, overrides=JSON_OPTIONS)
            case "regex":
                source = LLMatcher.grammar_from_regex(content)
            case _:
                source = LLMatcher.grammar_from_lark(content["lark"])
        self._matcher = LLMatcher(self._trie, source, log_level=0, limits=LIMITS)
        if self._matcher.is_error():
            raise ValueError(self._matcher.get_error())

    def mask(self) -> np.ndarray:
        return np.frombuffer(self._matcher.compute_bitmask(), np.uint8)

    def advance(self, token_id: int) -> bool:
        self._matcher.consume_token(token_id)
        if self._matcher.is_error():
            raise ValueError(self._matcher.get_error())
        return self._matcher.is_stopped()


class XGrammar:
    """With its defaults, white space bounded as ours is."""

    def __init__(self, directory: Path) -> None:
        import xgrammar
        from tokenizers import Tokenizer

        from cabochon.engine.detokenizer import TokenBytes

        of = TokenBytes(Tokenizer.from_file(str(directory / "tokenizer.json")))
        tokens = [b"" if i in of.special_ids else of.of(i) for i in range(VOCAB_SIZE)]
        self._xgrammar = xgrammar
        info = xgrammar.TokenizerInfo(tokens, vocab_size=VOCAB_SIZE, stop_token_ids=EOS_IDS)
        self._compiler = xgrammar.GrammarCompiler(info)
        self._bits = xgrammar.allocate_token_bitmask(1, VOCAB_SIZE)

    def compile(self, kind: str, content: Any) -> None:
        match kind:
            case "json":
                text = content if isinstance(content, str) else json.dumps(content)
                compiled = self._compiler.compile_json_schema(text, max_whitespace_cnt=8)
            case "regex":
                compiled = self._compiler.compile_regex(content)
            case _:
                compiled = self._compiler.compile_grammar(content["ebnf"])
        self._matcher = self._xgrammar.GrammarMatcher(compiled)

    def mask(self) -> np.ndarray:
        if not self._matcher.fill_next_token_bitmask(self._bits):
            return np.full(VOCAB_SIZE // 8, 255, np.uint8)  # everything may follow
        return self._bits[0].numpy().view(np.uint8)

    def advance(self, token_id: int) -> bool:
        self._matcher.accept_token(token_id)
        return self._matcher.is_terminated()


ENGINES = {"llguidance": LLGuidance, "xgrammar": XGrammar}


def walk(engine: Any, seed: int) -> list[float]:
    """CPU seconds of a mask and the step after it, for each token."""
    rng = np.random.default_rng(seed)
    taken_s = []
    for _ in range(STEPS):
        started_s = time.process_time()
        mask = engine.mask()
        taken_s.append(time.process_time() - started_s)
        allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little", count=VOCAB_SIZE))
        if not len(allowed):
            raise ValueError("no token is allowed")
        started_s = time.process_time()
        is_over = engine.advance(int(rng.choice(allowed)))
        taken_s[-1] += time.process_time() - started_s
        if is_over:
            break
    return taken_s


def one(name: str, case: str, directory: Path) -> dict[str, Any]:
    """In its own process: the result of a case; `usual` is all twenty schemas."""
    started_s = time.process_time()
    engine = ENGINES[name](directory)
    found: dict[str, Any] = {"start_cpu_s": round(time.process_time() - started_s, 2)}
    base_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    usual = {title: ("json", schema) for title, schema in SCHEMAS.items()}
    compile_s, first_s, mask_s, refused = [], [], [], {}
    for seed, (title, (kind, content)) in enumerate(
        (usual if case == "usual" else {case: BAD[case]}).items()
    ):
        try:
            started_s = time.process_time()
            engine.compile(kind, content)
            compile_s.append(time.process_time() - started_s)
            taken_s = walk(engine, seed)
            first_s.append(taken_s[0])
            mask_s += taken_s[1:]
        except Exception as error:  # of either engine: said in the row
            refused[title] = str(error).strip().splitlines()[0][:120]
    found["result"] = f"refused: {refused}" if refused else "followed"
    for key, values in {"compile": compile_s, "first_mask": first_s, "mask": mask_s}.items():
        if values:
            found[f"{key}_ms_median"] = round(statistics.median(values) * 1000, 3)
            found[f"{key}_ms_max"] = round(max(values) * 1000, 1)
    found["more_mib"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10) - base_mib
    return found


def main() -> None:
    args = parse_args()
    if args.case is not None:
        print(json.dumps(one(args.engine, args.case, args.directory)))
        return
    for case in ["usual", *BAD]:
        for name in ENGINES:
            command = [sys.executable, __file__, str(args.directory), "--engine", name, "--case", case]
            row: dict[str, Any] = {"engine": name, "case": case}
            try:
                run = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
                is_good = run.returncode == 0
                row |= (
                    json.loads(run.stdout.splitlines()[-1])
                    if is_good
                    else {"result": f"died {run.returncode}"}
                )
            except subprocess.TimeoutExpired:
                row["result"] = f"not done in {TIMEOUT_S} s"
            print(json.dumps(row), flush=True)
            if args.out is not None:
                with args.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("directory", type=Path)
    p.add_argument("--engine", choices=ENGINES)
    p.add_argument("--case")
    p.add_argument("--out", type=Path)
    return p.parse_args()


if __name__ == "__main__":
    main()

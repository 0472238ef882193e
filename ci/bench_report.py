"""Figures of the report and of serving, one JSON line each.

python ci/bench_report.py [RUN]      RUN: a finished run to report on; without it only the server is measured
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from helpers import report, serve
from helpers.gguf import ollama
from helpers.model import loading, offline


def say(what: str, value: float, unit: str, **setting: object) -> None:
    print(json.dumps({"what": what, "value": round(value, 3), "unit": unit, **setting}), flush=True)


def main() -> None:
    if len(sys.argv) > 1:
        started = time.perf_counter()
        path = report.build(sys.argv[1])
        say("report built", time.perf_counter() - started, "s", run=sys.argv[1], target="under 5")
        say("report size", path.stat().st_size / 1e6, "MB", run=sys.argv[1], target="under 1.5")
    started = time.perf_counter()
    server = serve.start(offline.wheel_gguf(), context=2048)
    say("server healthy", time.perf_counter() - started, "s", file=server.path.name)
    started = time.perf_counter()
    client = serve.client(server)
    story = [{"role": "user", "content": "Tell a story."}]
    answer = client.chat.completions.create(model=server.path.stem, messages=story, max_tokens=64, temperature=0)
    say("answer", answer.usage.completion_tokens / (time.perf_counter() - started), "tokens/s", file=server.path.name)
    serve.stop_all()
    tokenizer = loading.load_tokenizer(loading.resolve_model(loading.DEFAULT_MODEL))
    started = time.perf_counter()
    made = ollama.from_tokenizer(tokenizer)
    say(
        "Go template derived and compared",
        time.perf_counter() - started,
        "s",
        shapes=len(made.checks),
        equal=sum(c.equal for c in made.checks),
    )


if __name__ == "__main__":
    main()

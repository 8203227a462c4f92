"""Serve an adapter from Python: `python examples/generate.py [TARGET ADAPTER]`."""

import sys
from pathlib import Path

from vllm import LLM, SamplingParams

TINY = Path(__file__).parent / "tiny" / "target"


def main(target: str = str(TINY), adapter: str = "runs/adapter") -> None:
    llm = LLM(
        model=target,
        speculative_config={"method": "ppow", "model": adapter, "num_speculative_tokens": 8},
        max_model_len=512,
    )
    [output] = llm.generate("def test_", SamplingParams(temperature=0, max_tokens=64))
    print(output.outputs[0].text)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""--merge-lora on a real server: one fine-tune, served under its own name."""

from pathlib import Path

import openai
import pytest
from lora_maker import make_adapter
from real_server import RealServer

from cabochon.engine.config import EngineConfig
from cabochon.engine.llm import LLM
from cabochon.engine.models.hf_config import load_model_config
from cabochon.engine.sampling_params import SamplingParams
from cabochon.server.config import ServerConfig
from cabochon.server.serve import named
from cabochon.server.settings import Settings

PROMPT = [7, 90, 33, 120, 8, 61]


def test_the_sum_is_served_as_the_adapters_name_and_no_other(tiny_gemma2_dir: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path, load_model_config(tiny_gemma2_dir), 8)
    options = {"dtype": "fp32", "kv_cache_gib": 0.01, "threads": 1, "merge_lora": f"tickets={adapter}"}
    greedy = SamplingParams(temperature=0, max_tokens=6)
    (expected,) = LLM(str(tiny_gemma2_dir), **options).generate([PROMPT], greedy)
    with (
        RealServer(tiny_gemma2_dir, **options) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        assert [model.id for model in client.models.list()] == ["tickets"]
        answer = client.completions.create(model="tickets", prompt=PROMPT, max_tokens=6, temperature=0)
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model=str(tiny_gemma2_dir), prompt=PROMPT)
    assert (answer.model, answer.choices[0].text) == ("tickets", expected.text)


@pytest.mark.parametrize(
    ("merge_lora", "given", "names"),
    [
        (None, (), ("demo",)),
        ("x=path", (), ("x",)),
        ("x=path", ("y", "z"), ("y", "z")),
        (None, ("y",), ("y",)),
    ],
)
def test_names_that_are_given_win(
    merge_lora: str | None, given: tuple[str, ...], names: tuple[str, ...]
) -> None:
    settings = Settings(ServerConfig(served_model_name=given), EngineConfig(merge_lora=merge_lora))
    assert named(settings).served_model_name == names

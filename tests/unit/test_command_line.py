"""What a command of vLLM's asks for."""

from pathlib import Path

import pytest

from vllm_depthpar.errors import UserError
from vllm_depthpar.launch.command_line import options_in_file, options_of


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ([], {}),
        (["serve"], {"model": ""}),
        (["serve", "m", "--port", "1"], {"model": "m", "port": "1"}),
        (["serve", "--model", "m", "--eager"], {"model": "m", "eager": ""}),
        (["--model=m", "--model_impl=a=b"], {"model": "m", "model-impl": "a=b"}),
        (["chat", "m"], {}),
    ],
)
def test_own_words(words: list[str], options: dict[str, str]) -> None:
    assert options_of(words) == options


def test_file(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("model: m\nmodel-impl: depthpar\nenforce-eager: true\nrope:\n  factor: 2\n")
    found = options_in_file(["serve", "--config", str(file)])
    assert found["model"] == "m"
    assert found["model-impl"] == "depthpar"
    assert found["rope"] == '{"factor": 2}'
    # As vLLM has it.
    assert options_in_file(["serve", f"--config={file}"]) == {}
    assert options_in_file(["serve", "--config"]) == {}


@pytest.mark.parametrize("content", [None, "a: [", "- a", "3", "\0"])
def test_no_file(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "options.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(
        UserError, match=r"^--config .*options\.yaml can't be read \(.*\); allowed:"
    ) as raised:
        options_in_file(["serve", "--config", str(file)])
    assert "\n" not in str(raised.value)

import io

import pytest
from rich.console import Console

from lorakeet.base.records import Turn
from lorakeet.infer.sampling import SamplingSettings
from lorakeet.serve.engine import Engine
from lorakeet.serve.terminal import Chat, run_chat


@pytest.fixture
def talk(base_folder, adapters, monkeypatch):
    def run(*lines):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        output = io.StringIO()
        run_chat(
            str(base_folder), adapters, sampling=SamplingSettings(max_new_tokens=6),
            console=Console(file=output, width=200),
        )  # fmt: skip
        return output.getvalue()

    return run


def test_commands_switch_models_and_mistakes_are_told(talk):
    shown = talk(
        "hi", "/base", "hi", "/adapter med", "hi", "/adapter nobody", "/what", "/quit", "x"
    )
    assert "tiny-chat>" in shown and "med>" in shown
    assert "There is no model 'nobody'" in shown
    assert "loaded are tiny-chat, law, med" in shown


def test_the_end_of_the_input_ends_the_chat(talk):
    assert "law>" in talk("hi")


def test_a_conversation_grows_and_is_forgotten(base_folder):
    engine = Engine(str(base_folder))
    chat = Chat(engine, "tiny-chat", SamplingSettings(max_new_tokens=4))
    chat.reset(system="be short")
    pieces = []
    chat.answer("hi", pieces.append)
    assert [turn.role for turn in chat.turns] == ["system", "user", "assistant"]
    assert chat.turns[-1].content == "".join(pieces)
    chat.reset()
    assert chat.turns == [Turn(role="system", content="be short")]
    chat.reset(system="")
    assert chat.turns == []
    engine.close()

"""A model folder that cannot be understood is refused with what was found and what is needed."""

import json

import pytest

from lorakeet.base.errors import FileFormatError
from lorakeet.plan.model_config import DEFAULTS
from lorakeet.plan.model_facts import read_model_facts, read_shapes
from tests.plan.configs import OPTIONS, write_config

STRANGE = (0, -1, 1.5, "12", None, [], {}, True)
UNKNOWN = {"model_type": "new", "hidden_size": 8, "num_hidden_layers": 1}


@pytest.mark.parametrize("content", ["[]", "3", "null", '"llama"'])
def test_a_config_that_is_no_object_is_refused(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(FileFormatError, match="needed is an object"):
        read_model_facts(tmp_path)


def test_a_config_that_is_cut_off_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(FileFormatError, match="this is not JSON"):
        read_model_facts(tmp_path)


def test_all_wrong_sizes_are_named_at_once(tmp_path):
    write_config(tmp_path, {"model_type": "llama", "vocab_size": -5, "hidden_size": "64",
                            "num_hidden_layers": 0, "intermediate_size": None})  # fmt: skip
    with pytest.raises(FileFormatError) as caught:
        read_model_facts(tmp_path)
    for part in ("vocab_size is -5", "hidden_size is '64'", "num_hidden_layers is 0",
                 "intermediate_size is None", "at least 1"):  # fmt: skip
        assert part in str(caught.value)


def test_more_heads_than_hidden_numbers_are_refused(tmp_path):
    write_config(tmp_path, {"model_type": "gpt2", "n_embd": 4, "n_head": 8})
    with pytest.raises(FileFormatError, match="8 attention heads share a hidden_size of 4"):
        read_model_facts(tmp_path)


@pytest.mark.parametrize("family", list(OPTIONS))
def test_no_strange_value_ends_in_another_error(family, tmp_path):
    for name in {*DEFAULTS[family], *OPTIONS[family], "model_type", "head_dim"}:
        for value in STRANGE:
            write_config(tmp_path, {"model_type": family, name: value})
            for num_labels in (None, 2):
                try:
                    facts = read_model_facts(tmp_path, num_labels=num_labels)
                except FileFormatError as error:
                    assert "needed" in str(error).lower(), (name, value)
                else:
                    assert facts.parameters > 0, (name, value)


def test_an_unknown_architecture_without_weights_is_refused(tmp_path):
    write_config(tmp_path, UNKNOWN)
    with pytest.raises(FileFormatError, match="'new' is not known.*deberta-v2"):
        read_model_facts(tmp_path)


@pytest.mark.parametrize("missing", ["hidden_size", "num_hidden_layers"])
def test_an_unknown_architecture_needs_sizes_in_its_config(missing, tmp_path):
    write_config(tmp_path, {name: v for name, v in UNKNOWN.items() if name != missing})
    write_weights(tmp_path, {"a.weight": {"shape": [2, 2]}})
    with pytest.raises(FileFormatError, match=f"{missing} is missing"):
        read_model_facts(tmp_path)


def write_weights(folder, header):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    return path


def test_a_whole_header_gives_the_shapes(tmp_path):
    header = {"__metadata__": {"format": "pt"}, "a": {"dtype": "F32", "shape": [2, 3]}}
    assert read_shapes(write_weights(tmp_path, header)) == {"a": [2, 3]}


@pytest.mark.parametrize(
    "header",
    [b"", b"{", b"\xff\xfe", b"[]", b'{"a": 1}', b'{"a": {}}', b'{"a": {"shape": [-1]}}',
     b'{"a": {"shape": "2"}}'],
)  # fmt: skip
def test_a_header_of_another_form_is_refused(header, tmp_path):
    with pytest.raises(FileFormatError, match="without a whole safetensors header"):
        read_shapes(write_weights(tmp_path, header))


def test_weights_cut_off_anywhere_in_the_header_are_refused(tmp_path):
    path = write_weights(tmp_path, {"a": {"dtype": "F32", "shape": [2, 3]}})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(FileFormatError, match=f"{length} bytes without"):
            read_shapes(path)

import pytest

from lorakeet.base.errors import FileFormatError
from lorakeet.export.bundle import verify_bundle, write_card, write_manifest


def test_every_flipped_bit_truncation_and_loss_is_found(tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes(range(64)))
    (tmp_path / "b.txt").write_text("hello")
    hashes = write_manifest(tmp_path, lineage={"base": "x"})
    assert verify_bundle(tmp_path) == hashes and set(hashes) == {"a.bin", "b.txt"}
    whole = (tmp_path / "a.bin").read_bytes()
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        (tmp_path / "a.bin").write_bytes(changed)
        with pytest.raises(FileFormatError, match="a.bin has changed"):
            verify_bundle(tmp_path)
    (tmp_path / "a.bin").write_bytes(whole[:-1])
    (tmp_path / "b.txt").unlink()
    with pytest.raises(FileFormatError, match="63 bytes.*b.txt is missing"):
        verify_bundle(tmp_path)


def test_a_card_names_base_size_and_adapter(tmp_path):
    facts = {"base": "org/model: v1", "parameters": 1234, "bytes": 4936, "dtype": "float32",
             "adapter_sha256": "ab" * 32}  # fmt: skip
    write_card(tmp_path, facts=facts)
    card = (tmp_path / "README.md").read_text()
    assert 'base_model: "org/model: v1"' in card and "1,234" in card and "abab" in card

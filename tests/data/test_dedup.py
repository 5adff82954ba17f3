from lorakeet.base.records import Conversation, LabelledText, Origin, Passage, Turn
from lorakeet.data.dedup import Deduplicator, content_hash


def passage(text, line=1):
    return Passage(text=text, origin=Origin(path="a.txt", line=line))


def chat(*contents, line=1):
    roles = ("user", "assistant") * len(contents)
    turns = tuple(
        Turn(role=role, content=text) for role, text in zip(roles, contents, strict=False)
    )
    return Conversation(turns=turns, origin=Origin(path="chat.jsonl", line=line))


def is_same(left, right):
    return content_hash(left) == content_hash(right)


def test_the_first_of_equal_samples_is_named():
    seen = Deduplicator()
    assert seen.is_duplicate(chat("Hi", "Hello", line=3)) is None
    assert seen.is_duplicate(chat("Hi", "Bye", line=4)) is None
    assert seen.is_duplicate(chat(" hi ", "Hello!", line=5)) == Origin(path="chat.jsonl", line=3)
    assert seen.is_duplicate(passage("other", line=9)) is None
    assert seen.is_duplicate(passage("OTHER")) == Origin(path="a.txt", line=9)


def test_case_space_width_and_sentence_marks_do_not_count():
    assert is_same(passage("Ｈello,\n\n  World!"), passage("hello world"))
    assert is_same(passage("你好，世界。"), passage("你好 世界"))


def test_numbers_signs_and_order_count():
    for left, right in [
        ("What is 7 + 5?", "What is 7 + 6?"),
        ("8-2", "8*2"),
        ("3.5", "35"),
        ("a b", "b a"),
        ("?!", "."),
        ("f(x)", "f x"),
    ]:
        assert not is_same(passage(left), passage(right)), (left, right)


def test_roles_and_labels_count():
    assert not is_same(chat("a", "b"), chat("a b"))
    origin = Origin(path="a", line=1)
    positive, negative = (LabelledText(text="x", label=name, origin=origin) for name in "pn")
    assert not is_same(positive, negative)


def test_the_hash_is_the_same_in_every_run():
    assert content_hash(passage("hello")).hex() == "8ed7252f4b03f9e8376db5b2"


def test_many_texts_are_found_again_where_they_stood_first():
    seen = Deduplicator()
    keys = [n.to_bytes(12, "little") for n in range(30_000)]  # neighbours, which want one place
    keys += [(n << 64).to_bytes(12, "little") for n in range(1, 300)]
    for line, key in enumerate(keys, start=1):
        assert seen.find_first(key, Origin(path=f"{line % 3}.txt", line=line)) is None
    for line, key in enumerate(keys, start=1):
        first = seen.find_first(key, Origin(path="later", line=9))
        assert (first.path, first.line) == (f"{line % 3}.txt", line)

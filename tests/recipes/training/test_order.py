"""The order of documents: each once an epoch, the same after a look ahead, and taken up only with the same text."""

from collections.abc import Iterator

import pytest

from retrofit.adapters.layout import DraftLayout
from retrofit.errors import DataError, UsageError
from retrofit.recipes.text.documents import Document
from retrofit.recipes.training.order import SHUFFLE_BUFFER, Batch, Order, describe

COUNT = 50


def text(prompt: int = 1, answer: int = 2, name: str = "d") -> list[Document]:
    """Documents of a prompt token and two response tokens; every fifth is a prompt and nothing else."""
    return [
        Document(f"{name}{i}", (prompt, answer, i), (False, True, True), where=f"line {i}")
        if i % 5
        else Document(f"{name}{i}", (prompt, i), (False, False), where=f"line {i}")
        for i in range(COUNT)
    ]


def order_of(documents: list[Document], seed: int = 1, whole: bool = True) -> Order:
    def epochs(number: int) -> Iterator[Document]:
        return iter(documents)

    return Order(epochs, 4, seed, whole=whole, layout=DraftLayout())


def drawn(order: Order, batches: int) -> Batch:
    return [entry for _ in range(batches) for entry in order.batch()]


def test_every_document_with_a_response_once_an_epoch() -> None:
    order = order_of(text())
    found = [(document.id, epoch) for document, epoch in drawn(order, 300)]
    place = order.place()
    known = found + [(document.id, epoch) for document, epoch in place.buffer]
    assert len(set(known)) == len(known) == 1200 + SHUFFLE_BUFFER - 4
    with_response = {f"d{i}" for i in range(COUNT) if i % 5}
    for epoch in range(place.epoch):
        assert {name for name, e in known if e == epoch} == with_response
    assert place.epoch == (len(known) - 1) // 40 and 0 < place.taken <= COUNT
    assert found != sorted(found, key=lambda entry: entry[1]), "shuffled over epochs"


def test_the_order_is_that_of_its_seed() -> None:
    one, same, other = (drawn(order_of(text(), seed), 20) for seed in (1, 1, 2))
    assert one == same != other


def test_looking_at_what_comes_takes_nothing() -> None:
    order, plain = order_of(text()), order_of(text())
    assert [d.id for d in order.upcoming()] == ["d1", "d2", "d3", "d4"]
    assert drawn(order, 10) == drawn(plain, 10)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    ("change", "noticed"),
    [({}, False), ({"answer": 9}, None), ({"prompt": 9}, True), ({"name": "e"}, True)],
    ids=str,
)
def test_which_text_is_another(change: dict[str, int], noticed: bool | None, whole: bool) -> None:
    """Responses that are generated again need not be the same; prompts, and which documents there are, must."""
    order = order_of(text(), whole=whole)
    drawn(order, 10)
    place, again = order.place(), order_of(text(**change), whole=whole)
    if noticed or (noticed is None and whole):
        with pytest.raises(UsageError, match="the training text is not the one"):
            again.go_to(place)
        again.go_to(place, forced=True)
    else:
        again.go_to(place)
    assert [(d.id[1:], e) for d, e in drawn(again, 5)] == [(d.id[1:], e) for d, e in drawn(order, 5)]


def test_a_text_that_ends_before_the_place_is_another() -> None:
    order = order_of(text())
    order.batch()
    with pytest.raises(UsageError, match="the training text is not the one"):
        order_of(text()[:10]).go_to(order.place())


def test_text_without_a_response_is_refused() -> None:
    with pytest.raises(DataError, match="nothing to train: of 1 documents"):
        order_of(text()[:1]).batch()


def test_what_is_said_of_a_step() -> None:
    one, two, three = text()[:3]
    found = describe([[(one, 0)], [(two, 1), (three, 0)]], [{"uniform": [1]}, {"missed": [2]}, {}])
    assert [(d["batch"], d["document"], d["epoch"], d["anchors"]) for d in found] == [
        (0, "d0", 0, {"uniform": [1]}), (1, "d1", 1, {"missed": [2]}), (1, "d2", 0, {}),
    ]  # fmt: skip
    assert (found[1]["where"], found[1]["tokens"], found[1]["response"]) == ("line 1", [1, 2, 1], [0, 1, 1])

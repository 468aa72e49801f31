"""Every method says in its card what it is, and what it says is so."""

import re

import pytest

from lightning_sparse import strategies
from lightning_sparse.cards import Card, sections, words
from tests.helpers.models import Classifier, fit
from tests.helpers.strategies import SETTINGS

METHODS = {name: vars(strategies)[name] for name in strategies.__all__}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@every_method
def test_has_a_card_of_its_own(method):
    assert isinstance(vars(method).get("card"), Card), (
        f"{method.__name__} needs a class attribute `card = Card(...)`, see lightning_sparse/cards.py:"
        " the table of methods is made of it."
    )
    assert method.card.criterion, f"{method.__name__}.card needs `criterion`: which weights live."
    missing = [title for title, word in words(method).items() if not word]
    assert not missing, f"{method.__name__}.card says nothing about {missing}."


@every_method
def test_first_sentence_fits_on_a_line_and_the_paper_is_the_one_of_the_references(method):
    text = sections(method)[""]
    assert re.match(r"[A-Z].*\.(\n\n|$)", text), f"The docstring of {method.__name__} needs a first line of its own."
    if method.card.paper:
        assert re.fullmatch(r"[^\n]+, https://\S+", method.card.paper)
        assert any(method.card.address in (parent.__doc__ or "") for parent in method.__mro__)


@every_method
def test_published_figures_name_their_source(method):
    published = method.card.published
    assert not published or re.search(r" on .*%.* \((abstract|authors' \w+)\)$", published), published


@pytest.mark.parametrize("name", [name for name in SETTINGS if not name.startswith("SparseTraining")])
def test_dense_gradient_is_needed_when_the_card_says(name, monkeypatch):
    setting, asked = SETTINGS[name], []
    method = next(cls for cls in setting.method.__mro__ if cls in METHODS.values())
    answer = method.gradient_density

    def spy(self, density, context):
        asked.append((density, answer(self, density, context)))
        return asked[-1][1]

    monkeypatch.setattr(method, "gradient_density", spy)
    fit(Classifier(), setting.build(), max_epochs=4)
    pruned = [(density, backward) for density, backward in asked if density < 1.0]
    word = method.card.dense_gradient
    if method.stochastic:  # noisy weights are dense, forward and backward
        assert word in ("always", "until `freeze`")
        assert method.card.training_flops.startswith("3 f_D")
        return
    assert pruned
    assert (word == "never") == all(backward == density for density, backward in pruned)
    assert (word == "always") == all(backward == 1.0 for _, backward in pruned)
    assert (word == "never") == (method.card.training_flops == "3 f_S")
    assert (word == "always") == (method.card.training_flops == "2 f_S + f_D")

import pytest

from sonosco_mlflow.config import Config
from sonosco_mlflow.errors import UserError
from sonosco_mlflow.search_space import as_text, check_space, combination, draw, grid_size, read_space


def test_choices_and_ranges() -> None:
    space = read_space(
        ["model=tds,las", "schedule.epochs=[5, 7],[3]", "optimizer.lr=1e-4..1e-2:log", "training.seed=1..9"]
    )
    assert grid_size(read_space(["model=tds,las", "schedule.epochs=[5, 7],[3]"])) == 4
    drawn = [draw(space, number, seed=0) for number in range(50)]
    assert {values["model.name"] for values in drawn} == {"tds", "las"}
    assert {values["schedule.epochs"] for values in drawn} == {"[5, 7]", "[3]"}
    assert {values["training.seed"] for values in drawn} == {*range(1, 10)}
    rates = [values["optimizer.lr"] for values in drawn]
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    assert 10 < sum(rate < 1e-3 for rate in rates) < 40, "half of them in each of the two decades"
    for values in drawn:
        config = Config.resolve({}, {key: as_text(value) for key, value in values.items()})
        assert config.optimizer.lr == values["optimizer.lr"], "to the last bit"


def test_between_two_whole_numbers_lie_fractions_where_the_key_takes_them() -> None:
    dimensions = [
        "optimizer.momentum=0..1",
        "optimizer.lr=1..9:log",
        "training.seed=0..1",
        "model.settings.layers=1..3",
    ]
    space = read_space(dimensions)
    assert [type(varied).__name__.removesuffix("Distribution") for varied in space.values()] == [
        *("Float", "Float", "Int", "Int")
    ]
    assert draw(space, 0, seed=0)["optimizer.momentum"] not in {0, 1}


def test_a_draw_follows_from_its_number_and_the_seed_alone() -> None:
    space = read_space(["optimizer.lr=0.1..0.9", "training.seed=0..1000000"])
    drawn = [draw(space, number, seed=3) for number in range(5)]
    assert [draw(space, number, seed=3) for number in reversed(range(5))] == drawn[::-1]
    assert draw(space, 0, seed=4) != drawn[0]
    assert len({values["training.seed"] for values in drawn}) == 5


def test_the_grid_has_every_combination_once() -> None:
    space = read_space(["model=tds,las", "training.seed=1,2,3"])
    found = [tuple(combination(space, number).values()) for number in range(grid_size(space))]
    assert found == [("tds", 1), ("tds", 2), ("tds", 3), ("las", 1), ("las", 2), ("las", 3)]


@pytest.mark.parametrize(
    ("dimensions", "message"),
    [
        ([], "a sweep varies something"),
        (["optimizer.lr"], "expected key=first,second"),
        (["optimizer.lr="], "expected key=first,second"),
        (["model=tds", "model.name=las"], "model.name is varied twice"),
        (["optimizer.lr=a..b"], "expected two numbers"),
        (["optimizer.lr=1..2..3"], "expected two numbers"),
        (["optimizer.lr=2..1"], "low"),
        (["optimizer.lr=0..1:log"], "low"),
        (["optimizer.lr=1,1"], "a choice comes twice"),
        (["optimizer.lr=[1"], "cannot be read"),
        (["model= "], "found nothing; expected texts (in quotes) or numbers"),
        (["tracking.run_name=2020-01-01,b"], "found 2020-01-01, a date; expected texts (in quotes)"),
        (["optimizer.lr=1e-3,-1"], "optimizer.lr: found -1"),
        (["model=tds,lsa"], "did you mean 'las'"),
        (["optimizer.rl=1,2"], "unknown key; did you mean 'optimizer.lr'"),
    ],
)
def test_what_cannot_be_varied_is_refused_by_name(dimensions: list[str], message: str) -> None:
    with pytest.raises(UserError) as raised:
        check_space(read_space(dimensions), Config())
    assert message in str(raised.value)


def test_texts_that_look_like_something_else_stay_texts() -> None:
    space = read_space(["data.source=../a,../b", "tracking.run_name='1','true',plain,'@a','b: c: d'"])
    assert grid_size(space) == 10
    tree = [{key: as_text(value) for key, value in combination(space, number).items()} for number in range(10)]
    found = [Config.resolve({}, settings) for settings in tree]
    assert {config.data.corpora["default"].source for config in found} == {"../a", "../b"}
    assert {config.tracking.run_name for config in found} == {"1", "true", "plain", "@a", "b: c: d"}


def test_a_grid_has_no_range() -> None:
    with pytest.raises(UserError, match=r"optimizer\.lr has a range, and a grid has none"):
        grid_size(read_space(["optimizer.lr=0.1..0.2"]))

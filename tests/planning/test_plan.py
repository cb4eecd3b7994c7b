"""What a plan says of each offer, and which it refuses for its price."""

from __future__ import annotations

import io
import json
import re

import pytest

from flows.cli.answers import Answers
from flows.cli.console import show_plan, show_refusals
from outliers.errors import BadInput, PlanRefused
from outliers.hardware import GB, Facts, Gpu
from outliers.machines import base
from outliers.machines.base import Offer
from outliers.planning.offers import check_plan, request_for, suitable
from outliers.planning.plan import make_plan
from outliers.spec import StudySpec
from outliers.study.demand import demand_of
from outliers.study.prepare import layout_of, model_info
from tests.support import tiny


class Catalog:
    """A provider that only offers."""

    def __init__(self, *offers):
        self._offers = offers

    def offers(self, request):
        return self._offers, ()


def rented(name, price, gpu="A100"):
    return Offer("sky", name, Facts(8, 64 * GB, 60 * GB, 200 * GB, (Gpu(gpu, 40 * GB),), "3.11"), price)


@pytest.fixture
def planned(tmp_path, workspace):
    """(spec, ModelInfo) of a tiny model, with some of the spec's parts as they are given."""
    folder = tiny.make_model(tmp_path)

    def of(**parts):
        spec = StudySpec.model_validate(tiny.spec_for(folder, "builtin:python-docs", 3, 32) | parts)
        return spec, model_info(spec, workspace)

    return of


def shown(plan):
    console = Answers(file=io.StringIO())
    show_plan(console, plan)
    show_refusals(console, plan)
    return console.file.getvalue()


def test_each_offer_has_its_seconds_and_dollars(planned):
    spec, info = planned()
    plan = make_plan(spec, info, Catalog(rented("cheap", 1.0), rented("dear", 3.0), rented("odd", 2.0, "Z9000")))
    cheap, dear, odd = json.loads(plan.model_dump_json())["offers"]
    assert list(cheap["seconds"]) == ["boot", "deploy", "upload", "load", "pass", "analysis"]
    assert cheap["total_seconds"] == dear["total_seconds"] == round(sum(cheap["seconds"].values()), 1) > 420
    # boot and deploy are in it: 438 s at a dollar an hour
    assert cheap["total_price"] == pytest.approx(cheap["total_seconds"] / 3600, abs=1e-4)
    assert dear["total_price"] == pytest.approx(3 * cheap["total_price"], abs=1e-3)
    assert (odd["seconds"]["pass"], odd["total_price"], odd["left_out"]) == (None, None, ["pass"])
    assert plan.seconds == cheap["seconds"]
    assert [line.partition(": ")[0] for line in plan.assumptions] == list(plan.seconds)
    said = shown(plan)
    assert f"cheap: $1.00 an hour, about 7 min, ${cheap['total_price']:.2f} in all; 8 cores, 1 x A100" in said
    assert "odd: $2.00 an hour, more than 7 min without pass; 8 cores, 1 x Z9000" in said


def test_one_gpu_of_two_that_were_asked_says_why_the_model_is_not_cut(planned):
    spec, info = planned(compute={"gpu_count": 2, "processes": 1})
    facts = Facts(8, 64 * GB, 60 * GB, 200 * GB, (Gpu("A100", 40 * GB),) * 2, "3.11")
    said = shown(make_plan(spec, info, Catalog(Offer("sky", "two", facts, 1.0))))
    assert said.count("or more, where the model is cut over 2\n") == 2
    assert "one GPU is used (GPU 0): it holds the whole model, which is cut over 2 only where it must be\n" in said
    alone = shown(make_plan(*planned(compute={"gpu_count": 1}), Catalog(Offer("sky", "two", facts, 1.0))))
    assert "one GPU is used (GPU 0)\n" in alone
    assert "is cut over" not in alone


def test_the_first_offer_of_an_unknown_gpu_says_that_it_is_not_known(planned):
    plan = make_plan(*planned(), Catalog(rented("odd", 2.0, "Z9000")))
    assert "pass" not in plan.seconds
    assert "pass        not known: the speed of Z9000 is not known" in shown(plan)


def test_of_twenty_offers_eight_are_shown(planned):
    plan = make_plan(*planned(), Catalog(*(rented(f"m{number}", 1.0 + number) for number in range(20))))
    said = shown(plan)
    assert len(plan.offers) == 20
    assert sum(line.startswith("machine") for line in said.splitlines()) == 8
    assert "and 12 more machines that fit" in said
    assert said.count("one GPU is used") == 1


def test_what_costs_too_much_in_all_is_excluded_with_both_numbers(planned):
    spec, info = planned(compute={"max_total_price": 0.2})
    catalog = Catalog(rented("cheap", 1.0), rented("dear", 4.0), rented("free", 0.0))
    demand = demand_of(spec, info)
    found, excluded = suitable(demand, catalog, request_for(demand, 0))
    assert [candidate.offer.name for candidate in found] == ["cheap", "free"]
    ((name, reason),) = [(item.name, item.reason) for item in excluded]
    assert name == "dear"
    assert reason == (
        "the study would cost about $0.49 in all (7 min, at $4.00 an hour), and at most $0.20 is allowed (--max-total-price)"
    )
    with pytest.raises(PlanRefused, match=r"dear: the study would cost about \$0\.48"):
        check_plan(demand_of(spec, info), Catalog(rented("dear", 4.0)), 0)
    plan = make_plan(spec, info, Catalog(rented("dear", 4.0)))
    assert (plan.offers, plan.seconds, plan.assumptions, len(plan.refusals)) == ((), {}, (), 1)


def test_a_budget_counts_what_is_left(planned):
    """A capture that is there needs no upload and no pass: a machine that was too dear for all is not for the rest."""
    spec, info = planned(compute={"max_total_price": 0.36})  # 430 s and 438 s, at 3 dollars an hour
    dear = Catalog(rented("dear", 3.0))
    assert check_plan(demand_of(spec, info), dear, 0)
    with pytest.raises(PlanRefused, match="max-total-price"):
        check_plan(demand_of(spec, info), dear, layout_of(spec, info).total_bytes)


# A study that is spread. Four sequences of 32 tokens in batches of one: three parts are 1, 1 and 2 of them.


@pytest.fixture
def spread(tmp_path, workspace):
    """(spec, ModelInfo) of four sequences in three parts, with some of the compute as it is given."""
    folder = tiny.make_model(tmp_path)

    def of(**compute):
        made = tiny.spec_for(folder, "builtin:python-docs", 4, 32)
        spec = StudySpec.model_validate(made | {"compute": {"shards": 3} | compute})
        return spec, model_info(spec, workspace)

    return of


def test_the_price_of_a_spread_study_is_of_all_machines_and_the_time_of_the_longest_part(spread):
    one = make_plan(*spread(provider="sky", shards=1), Catalog(rented("a", 1.0)))
    three = make_plan(*spread(provider="sky"), Catalog(rented("a", 1.0)))
    (alone,), (each,) = one.offers, three.offers
    assert (each["machines"], each["price_per_hour"]) == (3, 1.0)
    # every machine boots, installs and loads
    assert [each["seconds"][name] for name in ("boot", "deploy", "load")] == [300, 120, alone["seconds"]["load"]]
    assert each["total_price"] == pytest.approx(3 * each["total_seconds"] / 3600, abs=1e-4)
    assert each["total_price"] > 2.9 * alone["total_price"]
    assert (three.capture_bytes, three.ram_bytes) == (one.capture_bytes, one.ram_bytes)
    said = shown(three)
    assert (
        "shards      3 machines at once, at most 2 of the 4 sequences each, of the disk 0.00 GB; memory is of each"
        in said
    )
    assert f"a: $1.00 an hour each, 3 of them, about 7 min, ${each['total_price']:.2f} in all" in said
    assert (one.spread, "shards" in shown(one)) == (None, False)


def test_a_machine_of_a_spread_study_is_asked_for_the_longest_part(spread):
    """A disk that holds two of four sequences and the weights is enough for three machines, and not for one."""
    spec, info = spread(provider="ssh")
    room = layout_of(spec, info).total_bytes // 2 + info.weights.checkpoint_bytes
    offer = rented("lab", 0.0)
    asked = []

    class Fitting(Catalog):
        def offers(self, request):
            asked.append(request.needed_disk_bytes)
            return super().offers(request)

    make_plan(spec, info, Fitting(offer))
    assert asked == [room]


def test_a_budget_is_for_all_machines(spread):
    """438 s at a dollar an hour are 12 cents, three times that are 36."""
    for most, fits in ((0.38, True), (0.30, False)):
        spec, info = spread(provider="sky", max_total_price=most)
        plan = make_plan(spec, info, Catalog(rented("a", 1.0)))
        assert bool(plan.offers) is fits
    assert plan.refusals[0].startswith(
        "a: the study would cost about $0.36 in all (7 min, on 3 machines at $1.00 an hour each), and at most $0.30"
    )
    with pytest.raises(PlanRefused, match="on 3 machines"):
        check_plan(demand_of(spec, info), Catalog(rented("a", 1.0)), layout_of(spec, info).total_bytes // 2)


class Here(Catalog):
    """This computer, with `ram` bytes of memory free."""

    def __init__(self, ram, gpus=()):
        super().__init__(Offer("local", "local", Facts(2, 64 * GB, ram, 200 * GB, gpus, "3.11"), 0.0))


def test_processes_on_this_machine_share_its_memory_and_cores(spread):
    spec, info = spread(shards=3)
    one = make_plan(*spread(shards=1), Here(64 * GB))
    plan = make_plan(spec, info, Here(3 * one.ram_bytes))
    assert (plan.ram_bytes, plan.offers[0]["machines"], plan.refusals) == (3 * one.ram_bytes, 1, ())
    # two cores: three processes import one and a half times as long; the bytes to count are all
    assert plan.seconds["load"] == pytest.approx(one.seconds["load"] + 4, abs=0.1)
    assert plan.seconds["analysis"] == one.seconds["analysis"]
    assert "for 3 processes on 2 cores" in shown(plan)
    assert "shards      3 processes at once on this machine, at most 2 of the 4 sequences each" in shown(plan)
    small = make_plan(spec, info, Here(3 * one.ram_bytes - 1))
    assert small.offers == ()
    assert small.refusals[0].startswith("local: 3 processes need ")
    assert small.refusals[0].endswith("GB is free: ask for fewer --shards")


def test_where_the_disk_is_too_small_the_refusal_says_what_rolling_would_take(planned_here):
    """Nothing is chosen: the numbers stand beside those of the full store, and the option fits where it is given."""
    spec, info = planned_here()
    layout = layout_of(spec, info)
    each = (layout.total_bytes - layout.side_bytes) // 40
    room = layout.side_bytes + 6 * each
    (said,) = make_plan(spec, info, Small(room)).refusals
    assert "the study needs" in said
    assert said.endswith("it counts windows of sequences, frees them, and keeps the first 4")
    assert "; --store rolling has at least" in said
    rolling, _ = planned_here(store="rolling")
    plan = make_plan(rolling, info, Small(room))
    assert (plan.refusals, plan.store, plan.held_bytes) == ((), "rolling", room)
    assert "at once, of" in shown(plan)
    assert shown(plan).count("--store rolling") == 1
    assert len(make_plan(rolling, info, Small(room - 1)).refusals) == 1
    # formats need the whole corpus: rolling is no way out
    formats, _ = planned_here(formats=["int8"])
    (said,) = make_plan(formats, info, Small(room)).refusals
    assert "rolling" not in said
    # the process that captures counts too
    assert demand_of(rolling, info).ram_bytes > demand_of(spec, info).ram_bytes


class Small(Catalog):
    """This computer, with so many bytes of disk free; it refuses as machines do."""

    def __init__(self, disk):
        super().__init__(Offer("local", "local", Facts(2, 64 * GB, 60 * GB, disk, (), "3.11"), 0.0))

    def offers(self, request):
        (offer,) = self._offers
        reasons = base.fits(offer.facts, request)
        return ((), (base.Excluded("local", "; ".join(reasons)),)) if reasons else ((offer,), ())


@pytest.fixture
def planned_here(tmp_path, workspace):
    """(spec, ModelInfo) of a tiny model and forty sequences, with what is given of the capture and the formats."""
    folder = tiny.make_model(tmp_path)

    def of(formats=(), **capture):
        made = tiny.spec_for(folder, "builtin:python-docs", 40, 32, capture=capture, formats={"formats": formats})
        spec = StudySpec.model_validate(made)
        return spec, model_info(spec, workspace, weights=False)

    return of


def test_more_parts_than_batches_are_refused_by_the_plan_in_the_words_of_the_study(spread):
    for provider in ("local", "sky"):
        with pytest.raises(BadInput, match=r"--shards 5 is more than the 4 batches of 1 sequence .*at most 4"):
            make_plan(*spread(shards=5, provider=provider), Catalog(rented("a", 1.0)))


def test_parts_on_two_gpus_of_this_machine_take_turns(spread):
    """A GPU each: three parts on two of them are two rounds of parts, 4 sequences; four are 2."""
    gpus = (Gpu("A100", 40 * GB),) * 2

    def tokens(shards):
        plan = make_plan(*spread(shards=shards), Here(64 * GB, gpus))
        assert [share["gpu"] for share in plan.offers[0]["shares"]] == [0]
        (told,) = [text for text in plan.assumptions if text.startswith("pass")]
        return re.search(r"([0-9,]+) tokens", told)[1]

    # without parts two processes share them
    assert [tokens(shards) for shards in (1, 2, 3, 4)] == ["64", "64", "128", "64"]


def test_a_part_has_one_gpu_alone(spread):
    """Two GPUs that hold the model between them are enough for one process, and none of them for a part."""
    one, two = (
        make_plan(*spread(shards=1, gpu_count=count), Catalog(rented("a", 0.0))).gpus[0].needed_bytes
        for count in (1, 2)
    )
    assert two < one
    gpus = (Gpu("A100", two),) * 2
    assert make_plan(*spread(shards=1), Here(64 * GB, gpus)).offers
    refused = make_plan(*spread(shards=2), Here(64 * GB, gpus))
    assert (refused.offers, "on one GPU" in refused.refusals[0]) == ((), True)

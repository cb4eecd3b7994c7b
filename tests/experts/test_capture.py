"""Experts from a capture to the totals of a study: against loops, through interruptions, in parts, damaged and mended."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from outliers.api import open_capture
from outliers.capture.extract import extract
from outliers.counting.analyze import analyze
from outliers.counting.merge import merge_summaries
from outliers.errors import BadInput, CorruptCapture
from outliers.experts.sums import LADDER
from outliers.experts.sums_files import sums_path, write_sums
from outliers.experts.table import FIELDS
from outliers.experts.totals_files import read_totals
from outliers.spec import StudySpec
from outliers.steps import capture_exists
from outliers.store.chunks import Journal
from outliers.store.fingerprint import read_fingerprint
from outliers.store.verify import verify
from outliers.study.prepare import prepare
from outliers.workspace import open_workspace
from tests.support import expert_oracle as oracle
from tests.support import tiny
from tests.support.captured import prepared
from tests.support.expert_captures import BATCH, arrays_of, layout_in, model_of, same_arrays, sums_in
from tests.support.synthetic import Silent


@pytest.mark.parametrize("family", ["DeepseekV3", "Qwen2Moe", "GptOss", "Llama4"])
def test_the_table_and_the_sums_are_those_of_loops_over_tokens_and_experts(tmp_path, family, documents):
    """A pass of its own gives each block's input; routing, inputs and outputs of experts come from loops in float64."""
    folder = model_of(tmp_path / "model", family)
    workspace = open_workspace(tmp_path / "workspace")
    packed = {"packing": "documents", "bos": "never"}
    study = prepared(workspace, folder, documents, sequences=4, length=12, capture=BATCH, corpus=packed)
    extract(study, workspace, Silent())
    table, lengths, ids = arrays_of(workspace, study)
    sums, shapes = sums_in(workspace, study), layout_in(workspace, study).experts
    assert lengths.min() < lengths.max(), "there is padding"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    least, most = (np.zeros((len(LADDER), len(shapes.layers), shapes.all_experts), int) for _ in range(2))
    rows = np.zeros(least.shape[1:], int)
    total = [[np.zeros(0)] * shapes.all_experts for _ in shapes.layers]
    for index, layer in enumerate(shapes.layers):
        block, router, experts, shared = oracle.block_of(model, family, layer)
        for sequence, length in enumerate(lengths):
            given = []
            handle = block.register_forward_pre_hook(lambda _m, args, given=given: given.append(args[0].clone()))
            with torch.inference_mode():
                model.model(input_ids=torch.tensor(ids[None, sequence, :length].astype(np.int64)))
            handle.remove()
            for position, x in enumerate(given[0].reshape(-1, shapes.hidden).double()):
                at = index, sequence, position
                score, made_of = oracle.scores(family, router, x)
                chosen = table["expert"][at][: shapes.slots].tolist()
                assert oracle.margin(score, chosen) >= -1e-5
                assert table["router_margin"][at][0] == pytest.approx(oracle.margin(score, chosen), abs=1e-4)
                weights = oracle.weights(family, router, model.config, made_of, chosen)
                assert table["expert_weight"][at][: shapes.slots].tolist() == pytest.approx(weights, abs=1e-5)
                for slot, number in enumerate(table["expert"][at].tolist()):
                    if number < shapes.experts:
                        factor = weights[slot] if family == "Llama4" else 1.0
                        inner, out = oracle.expert(family, experts, number, x * factor)
                    else:
                        inner, out = oracle.shared_expert(shared, x)
                    for name, values, place in (
                        ("expert_down_in", inner, "expert_down_in_column"),
                        ("expert_output", out, "expert_output_channel"),
                    ):
                        largest = float(values.abs().max())
                        assert table[name][at][slot] == pytest.approx(largest, rel=1e-4)
                        assert float(values[int(table[place][at][slot])].abs()) == pytest.approx(largest, rel=1e-4)
                    own = inner.abs().numpy()
                    # a value that lies as near to a magnitude as rounding goes may be a hit or not
                    least[:, index, number] += [int((own >= step * (1 + 1e-4)).sum()) for step in LADDER]
                    most[:, index, number] += [int((own >= step * (1 - 1e-4)).sum()) for step in LADDER]
                    rows[index, number] += 1
                    before = total[index][number]
                    total[index][number] = inner.numpy() + (before if before.size else 0)
            for name, values in table.items():
                fill = FIELDS[name][1]
                rest = values[index, sequence, length:]
                assert np.isnan(rest).all() if isinstance(fill, float) else (rest == fill).all()
    assert sums.rows.tolist() == rows.tolist() and (rows == 0).any() == (sums.low == np.inf).all(axis=-1).any()
    assert (least <= sums.hits).all() and (sums.hits <= most).all() and least[0].any()
    assert (most - least).sum() <= 0.01 * most.sum()
    for index in range(len(shapes.layers)):
        for number in range(shapes.experts):
            if rows[index, number]:
                np.testing.assert_allclose(sums.total[index, number], total[index][number], rtol=1e-3, atol=1e-4)


def test_activations_have_the_same_bits_with_and_without_and_ids_tell_them_apart(tmp_path, deepseek, documents):
    workspace = open_workspace(tmp_path / "workspace")
    found = {}
    for mode in ("auto", "all", "routing", "off"):
        study = prepared(workspace, deepseek, documents, sequences=4, length=24, capture=BATCH | {"experts": mode})
        extract(study, workspace, Silent())
        lines = Journal.open(workspace.capture(study.capture_id) / "journal.jsonl").done
        found[mode] = study, {s: [line["crc32"][site] for site in BATCH["sites"]] for s, line in lines.items()}
    assert found["auto"][0].capture_id == found["all"][0].capture_id
    assert len({study.capture_id for study, _ in found.values()}) == 3
    assert found["all"][1] == found["routing"][1] == found["off"][1]
    whole, routing = (arrays_of(workspace, found[mode][0])[0] for mode in ("all", "routing"))
    assert set(routing) == {"expert", "expert_weight", "router_margin"}
    for name, values in routing.items():
        assert values.tobytes() == whole[name][..., : values.shape[-1]].tobytes()
    for mode, layers in (("routing", 2), ("all", 2)):
        study = found[mode][0]
        totals = read_totals(analyze(study, workspace, Silent()))
        assert totals.per_sequence.shape[:2] == (4, layers)
        assert (totals.sums is None) == (mode == "routing") == (totals.input_squares is None)
    assert not (analyze(found["off"][0], workspace, Silent()) / "experts.npz").exists()


def test_the_routing_table_is_lazy_arrays_of_the_very_values(study, deepseek, documents):
    """Any index along any axis; shared experts as -1; NaN for padding and for the layer that is dense; damage is named."""
    workspace, whole = study
    extract(whole, workspace, Silent())
    routing = open_capture(whole.capture_id, workspace.root, part="routing")
    table, lengths, ids = arrays_of(workspace, whole)
    shapes = layout_in(workspace, whole).experts
    assert set(routing.data_vars) == set(FIELDS) and routing.layer.values.tolist() == [0, 1, 2]
    assert np.array_equal(routing.length, lengths) and np.array_equal(routing.token_id, ids)
    there = np.arange(ids.shape[1]) < lengths[:, None]
    for name, values in table.items():
        own = routing[name]
        assert own.dims == ("layer", "sequence", "position", "slot")[: 3 if name == "router_margin" else 4]
        assert not own.variable._in_memory and own.dtype == np.float32
        wanted = np.full((3, *values.shape[1:]), np.nan)
        wanted[1:] = np.where(there[..., None], values, np.nan)
        if name == "expert":
            wanted[wanted == shapes.experts] = -1
        wanted = wanted[..., 0] if name == "router_margin" else wanted
        assert np.array_equal(own.values, wanted, equal_nan=True), name
        some = {"layer": [2, 0], "sequence": slice(1, 5, 2), "position": 3}
        assert np.array_equal(own.isel(some).values, wanted[[2, 0], 1:5:2, 3], equal_nan=True), name
    assert (routing["expert"].sel(layer=1).isel(slot=-1).values[there] == -1).all()
    place = workspace.capture(whole.capture_id) / "activations.zarr" / "expert"
    damaged = next(path for path in sorted(place.rglob("*")) if path.is_file() and path.name != "zarr.json")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x07")
    assert routing["expert_weight"].values.size, "another field is whole"
    with pytest.raises(CorruptCapture):
        routing["expert"].load()
    off = prepared(workspace, deepseek, documents, sequences=2, length=12, capture=BATCH | {"experts": "off"})
    extract(off, workspace, Silent())
    with pytest.raises(BadInput, match="holds no routing"):
        open_capture(off.capture_id, workspace.root, part="routing")
    with pytest.raises(BadInput, match="the part 'sums' is not known: give activations or routing"):
        open_capture(off.capture_id, workspace.root, part="sums")


def test_parts_on_their_own_machines_join_to_the_whole(tmp_path, study, deepseek):
    workspace, whole = study
    extract(whole, workspace, Silent())
    one = read_totals(analyze(whole, workspace, Silent()))
    folders = []
    for number, span in enumerate((range(2), range(2, 6))):
        own = open_workspace(tmp_path / f"machine{number}")
        prepare(whole.spec, own)
        extract(whole, own, Silent(), sequences=span)
        folders.append(analyze(whole, own, Silent(), sequences=span))
    joined = read_totals(merge_summaries(folders, open_workspace(tmp_path / "home")).folder)
    assert joined.sequences.tolist() == list(range(6))
    for name, value in one.__dict__.items():
        other = getattr(joined, name)
        if isinstance(value, np.ndarray) and value.dtype == np.float64:
            np.testing.assert_allclose(other, value, rtol=1e-12)
        elif isinstance(value, np.ndarray):
            assert value.tobytes() == other.tobytes(), name
    np.testing.assert_allclose(joined.sums.squares, one.sums.squares, rtol=1e-12)
    assert joined.sums.hits.tobytes() == one.sums.hits.tobytes()


def test_an_executor_counts_the_same(study):
    workspace, whole = study
    extract(whole, workspace, Silent())
    one = read_totals(analyze(whole, workspace, Silent()))
    with ThreadPoolExecutor(2) as executor:
        two = read_totals(analyze(whole, workspace, Silent(), executor=executor, workers=2))
    same_arrays(one, two)
    same_arrays(one.sums, two.sums)


def test_a_capture_read_in_parts_here_gives_the_whole(tmp_path, study):
    workspace, whole = study
    for span in (range(2), range(2, 6)):
        extract(whole, workspace, Silent(), sequences=span)
    assert extract(whole, workspace, Silent())["sequences"] == 0
    other = open_workspace(tmp_path / "other")
    prepare(whole.spec, other)
    extract(whole, other, Silent())
    one, two = (read_totals(analyze(whole, home, Silent())) for home in (workspace, other))
    for name, value in one.__dict__.items():
        if isinstance(value, np.ndarray) and value.dtype != np.float64:
            assert value.tobytes() == getattr(two, name).tobytes(), name
    assert one.sums.hits.tobytes() == two.sums.hits.tobytes()


def test_a_damaged_table_is_named_and_computed_again_and_lost_sums_too(study):
    workspace, whole = study
    extract(whole, workspace, Silent())
    folder = workspace.capture(whole.capture_id)
    before = sums_in(workspace, whole)
    path = folder / "activations.zarr" / "expert_output" / "c.0.3.0.0"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    found = verify(folder, Silent(), repair=True)
    assert [(d.site, d.sequence, d.layer) for d in found.damage] == [("expert_output", 3, None)]
    assert found.marked == (3,) and not found.foreign
    extract(whole, workspace, Silent())
    assert path.read_bytes() == good
    same_arrays(before, sums_in(workspace, whole))
    (file,) = (folder / "experts").glob("*.npz")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    found = verify(folder, Silent())
    assert [d.file for d in found.damage] == ["experts/0-6.npz"] and "checksum" in found.message()
    assert verify(folder, Silent(), repair=True).marked == (0,)
    assert not file.exists()
    extract(whole, workspace, Silent())
    assert verify(folder, Silent()).sound
    same_arrays(before, sums_in(workspace, whole))
    file.unlink()
    assert not capture_exists(whole, workspace)
    extract(whole, workspace, Silent())
    same_arrays(before, sums_in(workspace, whole))
    assert verify(folder, Silent()).sound


def test_a_capture_that_begins_anew_takes_no_sums_of_the_former_one(study):
    """Without capture.json and journal nothing says under which conditions sums were made."""
    workspace, whole = study
    extract(whole, workspace, Silent())
    folder = workspace.capture(whole.capture_id)
    good = sums_in(workspace, whole)
    stale = replace(good, total=good.total + 1)
    write_sums(sums_path(folder, range(6)), stale)
    for name in ("capture.json", "journal.jsonl"):
        (folder / name).unlink()
    extract(whole, workspace, Silent())
    same_arrays(good, sums_in(workspace, whole))


def test_what_a_model_has_not_is_refused_before_anything_is_read(tmp_path, deepseek, documents):
    workspace = open_workspace(tmp_path / "workspace")
    dense = tiny.make_model(tmp_path / "dense", "Llama")
    with pytest.raises(BadInput, match="it has no experts"):
        prepared(workspace, dense, documents, capture={"experts": "routing"})
    with pytest.raises(BadInput, match=r"none of the layers that are read has experts; .* has them in 1, 2"):
        prepared(workspace, deepseek, documents, capture={"experts": "all", "layers": [0]})
    first = prepared(workspace, deepseek, documents, capture={"layers": [0]})
    assert layout_of_study(first).experts is None


def layout_of_study(study):
    from outliers.study.prepare import layout_of

    return layout_of(study.spec, study.model)


def test_a_dense_models_study_knows_nothing_of_experts(tmp_path, documents):
    workspace = open_workspace(tmp_path / "workspace")
    dense = tiny.make_model(tmp_path / "dense", "Llama")
    study = prepared(workspace, dense, documents)
    extract(study, workspace, Silent())
    folder = workspace.capture(study.capture_id)
    assert "experts" not in read_fingerprint(folder)["layout"]
    assert not (folder / "experts").exists()
    assert "experts" not in study.public_spec()["capture"]
    off = prepare(StudySpec.model_validate(study.spec.model_dump() | {"capture": {"experts": "off"}}), workspace)
    assert off.capture_id == study.capture_id

"""Whether ranks agree on their collectives: molmo2_nemo/rehearsal/collectives.py."""

import dataclasses

import rehearse

from molmo2_nemo.rehearsal.collectives import Collective, disagreements, totals

TP, DP, ALL = (0, 1), (0, 2), (0, 1, 2, 3)


def call(operation, ranks, size=8, peer=None, group="G"):
    return Collective("step", operation, group, ranks, size, float(size), "file.py:1", peer)


def test_ranks_that_agree():
    first = [call("all_gather", TP), call("all_reduce", DP, 4), call("all_reduce", ALL)]
    second = [call("all_gather", TP), call("all_reduce", (1, 3), 4), call("all_reduce", ALL)]
    assert disagreements({0: first, 1: second}) == []


def test_what_differs_is_named():
    calls = [call("all_gather", TP), call("all_reduce", ALL)]
    for other, words in (
        (calls[:1], "differ at call 2 that they share: all_reduce on G of 8 bytes (file.py:1) and nothing"),
        (calls[1:], "differ at call 1"),
        ([calls[0], call("all_reduce", ALL, 16)], "8 bytes (file.py:1) and all_reduce on G of 16 bytes"),
        ([call("reduce_scatter", TP), calls[1]], "all_gather on G of 8 bytes (file.py:1) and reduce_scatter"),
    ):
        (sentence,) = disagreements({0: calls, 1: other})
        assert sentence.startswith("ranks 0 and 1 ") and words in sentence


def test_types_are_compared_and_a_ring_is_found():
    sums, counts = (dataclasses.replace(call("all_reduce", TP), dtype=dtype) for dtype in ("float32", "int32"))
    (sentence,) = disagreements({0: [sums], 1: [counts]})
    assert "8 bytes of float32 (file.py:1) and all_reduce on G of 8 bytes of int32" in sentence
    # TP groups (0, 1) and (2, 3), CP groups (0, 2) and (1, 3): each pair shares one call alone.
    rows, columns = ((0, 1), (2, 3)), ((0, 2), (1, 3))
    in_order = {r: [call("all_reduce", rows[r // 2]), call("all_reduce", columns[r % 2])] for r in range(4)}
    assert disagreements(in_order) == []
    (sentence,) = disagreements({r: calls[:: -1 if r in (1, 2) else 1] for r, calls in in_order.items()})
    assert sentence.startswith("ranks wait for one another: rank 0 in all_reduce") and "; rank 3 in " in sentence


def test_two_groups_in_another_order():
    """Each group by itself is the same on both ranks, and yet they wait for each other."""
    one, other = call("all_gather", TP), call("all_gather", ALL)
    assert len(disagreements({0: [one, other], 1: [other, one]})) == 1


def test_every_rank_of_a_group_is_compared():
    calls = {rank: [call("all_reduce", ALL)] for rank in ALL}
    assert disagreements(calls) == []
    (sentence,) = disagreements(calls | {3: []})
    assert sentence.startswith("ranks 0 and 3 ")


def test_a_stage_receives_what_the_other_sends():
    sends = [call("send", TP, 8, peer=1), call("send", TP, 4, peer=1)]
    receives = [call("recv", TP, 8, peer=0), call("recv", TP, 4, peer=0)]
    assert disagreements({0: sends, 1: receives}) == []
    assert len(disagreements({0: sends, 1: receives[:1]})) == 1
    assert len(disagreements({0: sends, 1: receives[::-1]})) == 1


def test_totals():
    rows = totals([call("all_reduce", ALL, 8), call("all_reduce", ALL, 4), call("all_gather", TP, 100)])
    assert [(row["operation"], row["calls"], row["bytes"]) for row in rows] == [
        ("all_gather", 1, 100),
        ("all_reduce", 2, 12),
    ]


def test_settings_of_a_fine_tuning_need_no_data():
    """Steps instead of epochs, whatever they are, and the layout that hardware=auto finds for so many GPUs."""
    words = ["model=molmo2_8b", "data.mine=nowhere"]
    config, gpus, lines = rehearse.settings_of("finetune", [*words, "hardware=auto", "gpus=1"])
    assert (gpus, config.lora.rank) == (1, 16) and "full fine-tuning does not fit 1 GPU" in lines[0]
    assert config.train.max_steps > 0 and isinstance(config.train.save_every, int)
    config, gpus, lines = rehearse.settings_of("finetune", [*words, "parallel=tp2", "gpus=2"])
    assert (gpus, config.lora.rank, lines) == (2, 0, []) and config.train.epochs is None

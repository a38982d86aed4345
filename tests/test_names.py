"""Parts whose names meet, as keys may hold a "/", are told apart in what is recorded."""

import jax.numpy as jnp
import pytest

import optax_clip as oc
from optax_clip._records import distinct


def recorded(tx, updates, params=None):
    params = updates if params is None else params
    return {key: float(x) for key, x in oc.metrics(tx.update(updates, tx.init(params))[1]).items()}


def test_two_leaves_of_one_path_have_a_norm_each():
    updates = {"a": {"b": jnp.array([3.0, 4.0])}, "a/b": jnp.array([6.0, 8.0])}
    assert recorded(oc.record_norms(), updates) == {
        "norms/a/b/updates": 5.0,
        "norms/a/b_1/updates": 10.0,
    }
    clip = recorded(oc.clip_by_norm(1.0, record="scopes"), updates)
    assert (clip["clip/a/b/norm_before"], clip["clip/a/b_1/norm_before"]) == (5.0, 10.0)


def test_the_name_of_a_leaf_stays_when_another_has_no_update():
    params = {"a": {"b": jnp.array([3.0, 4.0])}, "a/b": jnp.array([6.0, 8.0])}
    got = recorded(oc.record_norms(), {"a": {"b": None}, "a/b": params["a/b"]}, params)
    assert got == {"norms/a/b/updates": 0.0, "norms/a/b_1/updates": 10.0}


def test_a_path_that_ends_inside_the_entry_of_another():
    updates = {"a": jnp.array([3.0, 4.0]), "a/updates": jnp.array([6.0, 8.0])}
    got = recorded(oc.record_norms(), updates)
    assert got == {"norms/a/updates": 5.0, "norms/a/updates_1/updates": 10.0}


@pytest.mark.parametrize("labels", [("a", "a/scope"), ("a/scope", "a")])
def test_a_label_that_ends_inside_the_entry_of_another(labels):
    by_label = oc.groups(lambda path, leaf: labels[int(path)])
    updates = [jnp.array([3.0, 4.0]), jnp.array([6.0, 8.0])]
    norms = dict(zip(labels, (5.0, 10.0), strict=True))
    got = recorded(oc.clip_by_norm(1.0, scope=by_label), updates)
    assert got["clip/a/norm_before"] == norms["a"]
    assert got["clip/a/scope_1/norm_before"] == norms["a/scope"]


@pytest.mark.parametrize(
    "names, expected",
    [
        (["a", "b"], ["a", "b"]),
        (["a", "a", "a"], ["a", "a_1", "a_2"]),
        (["a", "a", "a_1"], ["a", "a_2", "a_1"]),
        (["a", "a/f"], ["a", "a/f_1"]),
        (["a/f", "a"], ["a/f", "a_1"]),
        (["a/f/c", "a"], ["a/f/c", "a_1"]),
        (["f", "a/b", "a"], ["f", "a/b", "a"]),
    ],
)
def test_names_are_numbered_only_where_they_meet(names, expected):
    assert distinct(names, "f") == expected

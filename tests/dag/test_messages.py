"""Every pipeline that cannot work is refused with one sentence that begins with the file, the line and the node."""

from __future__ import annotations

import pytest

from siirl.config.schema import Config
from siirl.dag import Graph, plan_worker
from siirl.errors import RequestError

ROLLOUT = "{id: rollout, op: rollout, model: actor, reads: [prompt_ids], writes: [response_ids]}"
REWARD = "{id: reward, op: reward, reads: [prompt_ids, response_ids, row], writes: [reward, failed]}"

KEEP = "{id: keep, op: dynamic_sampling, params: {name: f}, reads: [group_id]}"
DRAWN = ROLLOUT.replace("ids]}", "ids, rollout_log_probs, policy_version]}")
OLD = (
    "{id: old, op: log_prob, model: actor, reads: [prompt_ids, response_ids, rollout_log_probs, policy_version], "
    "writes: [log_probs]}"
)


def python(name: str, **keys: str) -> str:
    return f"{{id: {name}, op: 'python:m:{name}'" + "".join(f", {key}: {value}" for key, value in keys.items()) + "}"


# The data node stands on line 2, the entries from line 3 on.
CASES = {
    "unknown op": (
        ["{id: roll, op: rollouts}"],
        "p.yaml:3: node 'roll': unknown op 'rollouts'; did you mean 'rollout'?",
    ),
    "python op": (["{id: a, op: 'python:m'}"], "p.yaml:3: node 'a': op 'python:m' is not of the form"),
    "duplicate id": ([python("a"), python("a")], "p.yaml:4: node 'a': the id is taken"),
    "unknown after": (
        [python("alpha"), python("b", after="[alhpa]")],
        "p.yaml:4: node 'b': 'after' names 'alhpa', which",
    ),
    "nobody writes": (
        [python("a", reads="[promt_ids]")],
        "p.yaml:3: node 'a': reads 'promt_ids', which no node writes; did you mean 'prompt_ids'?",
    ),
    "two writers": (
        [python("a", writes="[x]"), python("b", writes="{y: x}")],
        "p.yaml:4: node 'b': writes 'x', which node 'a' writes too",
    ),
    "cycle": (
        [
            python("c", reads="[z]", writes="[x]"),
            python("a", reads="[x]", writes="[y]"),
            python("b", reads="[y]", writes="[z]"),
        ],
        "p.yaml:3: node 'c': the nodes wait for each other in a cycle: c → a → b → c",
    ),
    "cycle through after": (
        [python("a", after="[b]", writes="[x]"), python("b", reads="[x]")],
        "p.yaml:3: node 'a': the nodes wait for each other in a cycle: a → b → a",
    ),
    "cycle beside others": (
        [python("head"), python("tail", after="[y]"), python("x", after="[y, head]"), python("y", after="[x]")],
        "p.yaml:5: node 'x': the nodes wait for each other in a cycle: x → y → x",
    ),
    "itself": (
        [python("a", reads="[x]", writes="[x]")],
        "p.yaml:3: node 'a': the nodes wait for each other in a cycle: a → a",
    ),
    "missing read": (
        [ROLLOUT, REWARD.replace(", row]", "]")],
        "p.yaml:4: node 'reward': op 'reward' must read 'row'",
    ),
    "missing write": (
        ["{id: r, op: rollout, model: actor, reads: [prompt_ids]}"],
        "node 'r': op 'rollout' must write 'response_ids'",
    ),
    "optional but required": ([ROLLOUT.replace("[prompt_ids]", "[prompt_ids?]")], "cannot do without 'prompt_ids'"),
    "read the op does not know": (
        [ROLLOUT.replace("[prompt_ids]", "[prompt_ids, row]")],
        "p.yaml:3: node 'rollout': op 'rollout' does not read 'row'",
    ),
    "write the op does not know": (
        [ROLLOUT.replace("[response_ids]", "[response_ids, finish_reasons]")],
        "does not write 'finish_reasons'; did you mean 'finish_reason'?",
    ),
    "model missing": (
        [ROLLOUT.replace("model: actor, ", "")],
        "p.yaml:3: node 'rollout': op 'rollout' needs a model: actor",
    ),
    "model that the op has not": ([ROLLOUT.replace("actor", "critic")], "op 'rollout' uses actor, not 'critic'"),
    "model where none is used": (
        [ROLLOUT, REWARD.replace("op: reward", "op: reward, model: actor")],
        "op 'reward' uses no model",
    ),
    "layout of the op": ([ROLLOUT.replace("model:", "layout: tokens, model:")], "op 'rollout' runs in layout 'groups'"),
    "groups cut apart": (
        [ROLLOUT, REWARD, "{id: a, op: advantage, layout: tokens, reads: [reward, group_id], writes: [advantages]}"],
        "p.yaml:5: node 'a': reads 'group_id', so it needs whole groups: layout 'groups'",
    ),
    "unknown parameter": ([ROLLOUT.replace("model:", "params: {n: 2}, model:")], "op 'rollout' has no parameter 'n'"),
    "filter without a name": (
        [ROLLOUT, "{id: f, op: filter, reads: [response_ids]}"],
        "p.yaml:4: node 'f': needs params: {name: FILTER}",
    ),
    "dynamic sampling without a name": (
        [ROLLOUT, "{id: k, op: dynamic_sampling, reads: [group_id]}"],
        "p.yaml:4: node 'k': needs params: {name: FILTER}",
    ),
    "dynamic sampling of cut groups": (
        [ROLLOUT, KEEP.replace("params", "layout: tokens, params")],
        "p.yaml:4: node 'keep': op 'dynamic_sampling' runs in layout 'groups', not 'tokens'",
    ),
    "dynamic sampling now and then": (
        [ROLLOUT, KEEP.replace("params", "every: 2, params")],
        "p.yaml:4: node 'keep': fills the step, which every step needs; it cannot have 'every'",
    ),
    "two loops": (
        [ROLLOUT, KEEP, KEEP.replace("keep", "again")],
        "p.yaml:5: node 'again': repeats what comes before it, as node 'keep' does; use one of them",
    ),
    "a column of the round that is there now and then": (
        [
            ROLLOUT,
            python("a", every="2", writes="[x]", after="[rollout]"),
            KEEP.replace("params", "after: [a], params"),
        ],
        "p.yaml:4: node 'a': writes columns at some steps only, in the round that node 'keep' repeats",
    ),
    "training within the round": (
        [
            ROLLOUT,
            "{id: u, op: update, model: actor, params: {loss: sft}, reads: [prompt_ids, response_ids], "
            "after: [rollout]}",
            KEEP.replace("params", "after: [u], params"),
        ],
        "p.yaml:4: node 'u': trains the actor in the round that node 'keep' repeats",
    ),
    "log-probs of an older policy without those of rollout": (
        [DRAWN, OLD.replace(", rollout_log_probs", "")],
        "p.yaml:4: node 'old': reads 'policy_version' without 'rollout_log_probs'",
    ),
    "log-probs of rollout for another model": (
        [DRAWN, OLD.replace("actor", "reference")],
        "p.yaml:4: node 'old': reads 'rollout_log_probs', which is of the actor, not of the reference",
    ),
    "loss": (
        [ROLLOUT, "{id: u, op: update, model: actor, params: {loss: polcy}, reads: [prompt_ids, response_ids]}"],
        "p.yaml:4: node 'u': params.loss is 'polcy'; use one of policy, value, sft; did you mean 'policy'?",
    ),
    "loss without its columns": (
        [ROLLOUT, "{id: u, op: update, model: actor, reads: [prompt_ids, response_ids]}"],
        "node 'u': params.loss 'policy' needs to read 'advantages'",
    ),
    "loss of another model": (
        [ROLLOUT, "{id: u, op: update, model: actor, params: {loss: value}, reads: [prompt_ids, response_ids]}"],
        "node 'u': params.loss 'value' trains the critic, not the actor",
    ),
    "key in every": (
        [python("a", every="logging.sample_every")],
        "p.yaml:3: node 'a': 'logging.sample_every' is no config",
    ),
    "every of another kind": (
        [python("a", every="training.lr")],
        "p.yaml:3: node 'a': 'every' is training.lr, which is 1e-06",
    ),
    "key in when": (
        [python("a", when="algorithm.kl > 0")],
        "p.yaml:3: node 'a': 'algorithm.kl' is no configuration key",
    ),
    "required read of a dropped node": (
        [python("a", when="algorithm.kl_coef > 0", writes="[x]"), python("b", reads="[x]")],
        "p.yaml:4: node 'b': reads 'x', but node 'a', which writes it, is dropped: 'algorithm.kl_coef > 0' is false",
    ),
    "required read of a switched-off node": (
        [python("a", every="evaluation.every", writes="[x]"), python("b", reads="[x]")],
        "is dropped: 'every' is evaluation.every, which is 0",
    ),
    "required read of what is written now and then": (
        [python("a", when="step > 3", writes="[x]"), python("b", reads="[x]")],
        "p.yaml:4: node 'b': reads 'x' at steps at which node 'a' does not write it (step > 3)",
    ),
    "read more often than written": (
        [python("a", every="4", writes="[x]"), python("b", every="2", reads="[x]")],
        "node 'b': reads 'x' at steps at which node 'a' does not write it (every 4 steps)",
    ),
    "before or after the rows change": (
        [ROLLOUT, python("a", reads="[prompt_ids]")],
        "p.yaml:4: node 'a': may run before or after node 'rollout', which changes the rows; say which",
    ),
    "before or after the update": (
        [
            ROLLOUT,
            "{id: sync, op: sync_weights, model: actor}",
            "{id: u, op: update, model: actor, params: {loss: sft}, reads: [prompt_ids, response_ids]}",
        ],
        "p.yaml:4: node 'sync': may run before or after node 'u', which trains the actor; say which: 'after: [u]' here",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_with_place_and_sentence(case: str, graph_of, config: Config) -> None:
    entries, message = CASES[case]
    graph: Graph = graph_of(*entries)
    for workers in (1, 2):
        with pytest.raises(RequestError) as error:
            plan_worker(graph, config, workers, 0)
        assert message in str(error.value)
        assert str(error.value).startswith("p.yaml:")
        assert "\n" not in str(error.value)


def test_the_line_is_that_of_the_key_not_of_the_node(parse, config: Config) -> None:
    graph = parse("""
        nodes:
          - id: a
            op: python:m:a
            writes:
              - x
          - id: b
            op: python:m:b
            reads:
              - x
              - why
    """)
    with pytest.raises(RequestError, match=r"^p.yaml:11: node 'b': reads 'why'"):
        plan_worker(graph, config, 1, 0)


def test_rows_without_data_cannot_have_conditions(graph_of, config: Config) -> None:
    graph = graph_of(data="{id: data, op: data, every: 2, writes: [sample_id, group_id, slot, prompt_ids, row]}")
    with pytest.raises(RequestError, match="p.yaml:2: node 'data': makes the rows"):
        plan_worker(graph, config, 1, 0)


def test_supervised_data_and_its_responses_go_together(graph_of, config: Config) -> None:
    plain = "{id: data, op: data, writes: [sample_id, group_id, slot, prompt_ids, row, response_ids]}"
    with pytest.raises(RequestError, match="needs params: {supervised: true}"):
        plan_worker(graph_of(data=plain), config, 1, 0)
    with pytest.raises(RequestError, match="so it must write 'response_ids'"):
        plan_worker(graph_of(data=plain.replace(", response_ids]", "], params: {supervised: true}")), config, 1, 0)


def test_rows_that_move_need_their_ids(parse, config: Config) -> None:
    for ids in ("", "sample_id, slot, "):
        graph = parse(f"""
            nodes:
              - {{id: source, op: 'python:m:f', writes: [{ids}x, y]}}
              - {{id: middle, op: 'python:m:f', layout: tokens, reads: [x], writes: [z]}}
              - {{id: end, op: 'python:m:f', reads: [y, z]}}
        """)
        for workers in (1, 2):
            with pytest.raises(RequestError, match=r"p.yaml:4: node 'middle': .* no node before it writes 'group_id'"):
                plan_worker(graph, config, workers, 0)


def test_degrees_that_do_not_make_up_the_workers(graph_of) -> None:
    graph = graph_of("{id: a, op: 'python:m:f', layout: tokens, reads: [prompt_ids]}")
    config = Config(training={"parallel": {"tensor": 2, "data": 3}})  # type: ignore[arg-type]
    with pytest.raises(RequestError) as error:
        plan_worker(graph, config, 4, 0)
    assert str(error.value) == (
        "p.yaml:3: node 'a': training.parallel: data 3 x tensor 2 x context 1 x pipeline 1 is 6 workers, "
        "but the run has 4; set training.parallel.data=2"
    )


def test_every_node_dropped(parse, config: Config) -> None:
    with pytest.raises(RequestError, match="p.yaml: every node is dropped by its condition"):
        plan_worker(parse("nodes:\n  - {id: a, op: 'python:m:f', when: false}\n"), config, 1, 0)

"""The specification of a workflow: what is read, what counts, and every refusal with its place."""

from __future__ import annotations

import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support.graphs import graphs

from wsgi_ts.errors import InvalidDag, InvalidWorkflow
from wsgi_ts.workflows.options import NodeOptions, SharedModel
from wsgi_ts.workflows.spec import NodeKind, Numbers, java_text, parse_spec

#: As TorchServe's documentation, and tutorials after it, print it.
DOCUMENTED = """
models:
    #global model params
    min-workers: 1
    max-workers: 4
    batch-size: 3
    max-batch-delay : 5000
    retry-attempts : 3
    timeout-ms : 5000
    m1:
       url : model1.mar #local or public URI
       min-workers: 1   #override the global params
       max-workers: 2
       batch-size: 4
    m2:
       url : model2.mar
    m3:
       url : model3.mar
       batch-size: 3
    m4:
      url : model4.mar
dag:
  pre_processing : [m1]
  m1 : [m2]
  m2 : [m3]
  m3 : [m4]
  m4 : [postprocessing]
"""


def test_the_documented_specification() -> None:
    spec = parse_spec(DOCUMENTED)
    assert spec.numbers == Numbers(1, 4, 3, 5000, 3, 5000)
    assert list(spec.nodes) == ["pre_processing", "m1", "m2", "m3", "m4", "postprocessing"]
    assert spec.order == tuple(spec.nodes)
    assert (spec.start, spec.leaves) == ("pre_processing", ("postprocessing",))
    first = spec.nodes["m1"]
    assert (first.kind, first.url, first.numbers) == (NodeKind.MODEL, "model1.mar", Numbers(1, 2, 4, 5000, 3, 5000))
    assert (first.parents, first.successors) == (("pre_processing",), ("m2",))
    function = spec.nodes["postprocessing"]
    assert (function.kind, function.url) == (NodeKind.FUNCTION, None)
    assert function.numbers == Numbers(1, 1, 1, 0, 3, 5000)
    assert spec.dag_text == "{pre_processing=[m1], m1=[m2], m2=[m3], m3=[m4], m4=[postprocessing]}"


def test_a_global_number_counts_for_the_models_behind_it_and_the_last_for_functions() -> None:
    spec = parse_spec(
        "models:\n a: {url: a.mar}\n retry-attempts: 5\n b: {url: b.mar}\n retry-attempts: 7\n timeout-ms: 9\n"
        "dag: {a: [b], b: [f]}\n"
    )
    # Of a key that stands twice the last counts, where it stands.
    assert [node.numbers.retry_attempts for node in spec.nodes.values()] == [1, 1, 7]
    assert [node.numbers.timeout_ms for node in spec.nodes.values()] == [10_000, 10_000, 9]
    assert spec.numbers.retry_attempts == 7


def test_defaults_unused_models_empty_successors_and_the_numbers_of_the_archive() -> None:
    spec = parse_spec(
        "models:\n a: {url: a.mar, batch-size: -1, max-batch-delay: -100, colour: red}\n b: {url: b.mar}\n"
        'dag:\n  a: ["", null, " ", f]\n  f: []\n'
    )
    assert spec.numbers == Numbers(1, 1, 1, 50, 1, 10_000)
    assert (spec.nodes["a"].numbers.batch_size, spec.nodes["a"].numbers.max_batch_delay_ms) == (-1, -100)
    assert spec.nodes["a"].successors == ("f",)
    assert spec.unused == ("b",)
    assert spec.dag_text == "{a=[, null,  , f], f=[]}"


def test_a_node_of_several_parents_stands_behind_all_of_them() -> None:
    spec = parse_spec(
        "models: {}\ndag: {s: [late, a], a: [b], b: [late], late: [], other: []}".replace(", other: []", "")
    )
    assert spec.nodes["late"].parents == ("s", "b")
    assert spec.order == ("s", "a", "b", "late")
    assert list(spec.nodes) == ["s", "late", "a", "b"]


@pytest.mark.parametrize(
    ("dag", "message", "line"),
    [
        ("a: [a]", "Self loop exception", 3),
        ("a: [b, b]", "loop exception", 3),
        ("a: [b, b]\n  c: [c]", "loop exception", 3),
        ("a: [b]\n  c: [b]", "DAG should have only one start node", 2),
        ("a: [b]\n  b: [a]", "DAG should have only one start node", 2),
        ("a: [b]\n  b: [c]\n  c: [b]", "Not a valid DAG", 2),
        ("a: [b]\n  b: [b]", "Self loop exception", 4),
    ],
)
def test_a_wrong_graph_has_the_text_of_torchserve(dag: str, message: str, line: int) -> None:
    with pytest.raises(InvalidDag) as caught:
        parse_spec(f"models: {{}}\ndag:\n  {dag}\n", "s.yaml")
    assert caught.value.to_dict() == {"code": 400, "type": "InvalidDAGException", "message": message}
    assert caught.value.where == f"s.yaml:{line}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "s.yaml: not a mapping with the sections models and dag"),
        ("- a", "s.yaml: not a mapping with the sections models and dag"),
        ("dag: {a: []}", "s.yaml: the section models is missing"),
        ("models: {}", "s.yaml: the section dag is missing"),
        ("models: {}\ndag:", "s.yaml:2: key dag: None is not a mapping of keys to values"),
        ("models: [a]\ndag: {}", "s.yaml:1: key models: ['a'] is not a mapping of keys to values"),
        ("models: {}\ndag: {}", "DAG should have only one start node"),
        (
            'models:\n  batch-size: "4"\ndag: {a: []}',
            "s.yaml:2: key models.batch-size: '4' is not a whole number: remove the quotes",
        ),
        ("models:\n  batch-size: 4.5\ndag: {a: []}", "s.yaml:2: key models.batch-size: 4.5 is not a whole number"),
        ("models:\n  batch-size: true\ndag: {a: []}", "s.yaml:2: key models.batch-size: True is not a whole number"),
        (
            "models:\n  m:\n    url: m.mar\n    timeout-ms:\ndag: {m: []}",
            "s.yaml:4: key models.m.timeout-ms: None is not a whole number",
        ),
        (
            "models:\n  timeout-ms: 3000000000\ndag: {a: []}",
            "s.yaml:2: key models.timeout-ms: 3000000000 is not between 1 and 2147483647",
        ),
        (
            "models:\n  retry-attempts: -1\ndag: {a: []}",
            "s.yaml:2: key models.retry-attempts: -1 is not between 0 and 2147483647",
        ),
        (
            "models:\n  m: x.mar\ndag: {m: []}",
            "s.yaml:2: key models.m: 'x.mar' is not a mapping: write `url: x.mar` below it",
        ),
        ("models:\n  m:\ndag: {m: []}", "s.yaml:2: key models.m: None is not a mapping of keys to values"),
        ("models:\n  m: {url: 5}\ndag: {m: []}", "s.yaml:2: key models.m.url: 5 is not a text"),
        ("models: {}\ndag:\n  a: b", "s.yaml:3: key dag.a: 'b' is not a list of nodes: write [b]"),
        ("models: {}\ndag:\n  a:", "s.yaml:3: key dag.a: None is not a list of nodes"),
        (
            "models: {}\ndag:\n  a: [5]",
            "s.yaml:3: key dag.a: 5 is not a text, which a name has to be: put it in quotes",
        ),
        (
            "models: {}\ndag:\n  yes: [b]",
            "s.yaml:3: key dag.True: True is not a text, which a name has to be: put it in quotes",
        ),
    ],
)
def test_what_ends_in_a_java_exception_there_names_key_and_line_here(text: str, message: str) -> None:
    with pytest.raises(InvalidDag) as caught:
        parse_spec(text, "s.yaml")
    assert (caught.value.status, caught.value.message) == (400, message)


def test_models_are_read_before_the_graph_and_options_last() -> None:
    with pytest.raises(InvalidDag, match=re.escape("key models.m: None")):
        parse_spec("dag: {a: [a]}\nmodels: {m: }\noptions: 5")
    with pytest.raises(InvalidDag, match="Self loop"):
        parse_spec("dag: {a: [a]}\nmodels: {}\noptions: 5")


def test_more_nodes_than_there_is_room_for() -> None:
    chain = "".join(f"  n{number}: [n{number + 1}]\n" for number in range(1024))
    with pytest.raises(InvalidDag, match=r"^s.yaml:2: key dag: 1025 nodes, and no more than 1024 can be registered$"):
        parse_spec(f"models: {{}}\ndag:\n{chain}", "s.yaml")
    assert len(parse_spec(f"models: {{}}\ndag:\n{chain}".replace("  n0: [n1]\n", "")).nodes) == 1024


def test_a_name_that_cannot_be_a_models_name_is_refused() -> None:
    with pytest.raises(InvalidDag, match=r"^s.yaml:2: key dag.a: Node name is not allowed: b/c"):
        parse_spec("models: {}\ndag: {a: [b/c]}", "s.yaml")


@pytest.mark.parametrize(
    "text",
    [
        *("models: [", "models: !!python/object/apply:os.system [ls]", "a: &a [*a]", "? [a]\n: b"),
        "x: " + "a" * (1 << 20),
        # Halves of surrogate pairs cannot be sent to anybody, and numbers of so many digits not be written.
        'models: {}\ndag: {a: ["\\ud800"]}',
        'models: {}\ndag: {"\\udfff": []}',
        'models: {}\ndag: {a: [b]}\noptions: {nodes: {b: {on-error: default, default: "\\ud800"}}}',
        f"models: {{batch-size: 0x{'f' * 5000}}}\ndag: {{a: []}}",
        f"models:\n  ? 0x{'f' * 5000}\n  : {{}}\ndag: {{a: []}}",
        f"models: {{}}\ndag: {{a: [b]}}\noptions: {{nodes: {{b: {{on-error: default, default: 0x{'f' * 5000}}}}}}}",
    ],
)
def test_bad_yaml(text: str) -> None:
    with pytest.raises(InvalidWorkflow) as caught:
        parse_spec(text)
    assert caught.value.to_dict() == {
        "code": 500,
        "type": "InvalidWorkflowException",
        "message": "Failed to parse yaml.",
    }


def test_aliases_that_blow_up_are_refused() -> None:
    bomb = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9))
    with pytest.raises(InvalidWorkflow):
        parse_spec(bomb)


def test_anchors_and_merge_keys() -> None:
    spec = parse_spec("models:\n  a: &base {url: a.mar, batch-size: 2}\n  b: {<<: *base, url: b.mar}\ndag: {a: [b]}")
    assert (spec.nodes["b"].url, spec.nodes["b"].numbers.batch_size) == ("b.mar", 2)


GRAPH = "models: {m: {url: m.mar}}\ndag: {s: [m], m: [e], e: [f]}\noptions:\n  nodes:\n    "


def test_options() -> None:
    spec = parse_spec(
        "models: {m: {url: m.mar}}\ndag: {s: [m], m: [e, o, d], e: [f]}\n"
        "options:\n  nodes:\n    s: {scatter: false, batch-size: 8}\n    m: {model: minilm/2.0, pass: [request]}\n"
        "    e: {when: is_dog}\n    o: {optional: true}\n    d: {on-error: default, default: {score: [1, null]}}\n"
    )
    assert spec.nodes["s"].numbers.batch_size == 8
    assert spec.nodes["m"].options == NodeOptions(model=SharedModel("minilm", "2.0"), pass_request=True)
    assert spec.nodes["e"].options == NodeOptions(when="is_dog")
    assert spec.nodes["o"].options == NodeOptions(optional=True, on_error="skip")
    assert spec.nodes["d"].options == NodeOptions(on_error="default", default={"score": [1, None]})
    assert spec.nodes["f"].options == NodeOptions()


def test_a_limit_for_the_whole() -> None:
    spec = "models: {}\ndag: {a: []}\n"
    assert parse_spec(spec).timeout_ms == 0
    assert parse_spec(spec + "options: {timeout-ms: 1500}").timeout_ms == 1500


def test_a_function_that_is_named_as_a_registered_model_is_one() -> None:
    spec = parse_spec("models: {}\ndag: {s: [m]}\noptions: {nodes: {m: {model: minilm}}}")
    assert (spec.nodes["m"].kind, spec.nodes["m"].options.model) == (NodeKind.MODEL, SharedModel("minilm"))


def test_scatter_and_gather_hold_a_chain() -> None:
    spec = parse_spec(GRAPH + "s: {scatter: true}\n    f: {gather: true}")
    assert spec.nodes["s"].options.scatter and spec.nodes["f"].options.gather


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("x: {}", "key options.nodes.x: there is no node of that name in dag"),
        ("m: 5", "key options.nodes.m: 5 is not a mapping of keys to values"),
        ("m: {wehn: f}", "key options.nodes.m.wehn: unknown; there are when, on-error,"),
        ("m: {when: a-b}", "key options.nodes.m.when: 'a-b' is not the name of a Python function"),
        ("m: {when: 5}", "key options.nodes.m.when: 5 is not a text"),
        ("m: {on-error: ignore}", "'ignore' is none of: fail, skip, default, tell"),
        ("m: {on-error: default}", "on-error: default and the key default need each other"),
        ("m: {default: 5}", "on-error: default and the key default need each other"),
        ("m: {on-error: default, default: 2020-01-01}", "cannot be written as JSON"),
        ("m: {on-error: default, default: [.nan]}", "cannot be written as JSON"),
        ("m: {optional: true, on-error: fail}", "an optional node is skipped when it fails"),
        ("m: {optional: yes please}", "'yes please' is neither true nor false"),
        ("m: {model: a/b/c}", "is not a model's name, or name/version"),
        ("m: {pass: [body]}", "['body'] is not [request]"),
        ("m: {batch-size: 4}", "key options.nodes.m.batch-size: is for functions"),
        ("e: {batch-size: 0}", "0 is not a whole number between 1 and"),
        ("s: {when: f}", "key options.nodes.s.when: does not go with the start node"),
        ("s: {on-error: skip}", "the start node cannot be skipped"),
        ("s: {optional: true}", "key options.nodes.s.optional: does not go with the start node"),
        ("m: {scatter: true}", "what follows has to be a chain up to a node with gather, which it is not at f"),
        ("m: {gather: true}", "there is no node with scatter before it"),
        ("s: {scatter: true}\n    m: {scatter: true}\n    f: {gather: true}", "scattered again at m"),
    ],
)
def test_wrong_options_name_key_and_line(options: str, message: str) -> None:
    with pytest.raises(InvalidDag) as caught:
        parse_spec(GRAPH + options, "s.yaml")
    assert message in caught.value.message
    assert re.match(r"s\.yaml:[56]: key options\.nodes\.", caught.value.message)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("5", "key options: 5 is not"),
        ("{node: {}}", "key options.node: unknown"),
        ("{nodes: 5}", "key options.nodes: 5"),
        ("{timeout-ms: 0}", "key options.timeout-ms: 0 is not a whole number between 1 and 2147483647"),
        ("{timeout-ms: '5'}", "key options.timeout-ms: '5' is not a whole number"),
        ("{timeout-ms: true}", "key options.timeout-ms: True is not a whole number"),
    ],
)
def test_a_wrong_section_of_options(section: str, message: str) -> None:
    with pytest.raises(InvalidDag, match=re.escape(message)):
        parse_spec(f"models: {{}}\ndag: {{a: []}}\noptions: {section}")


def test_java_text() -> None:
    assert java_text({"a": ["b", None, ""], "c": []}) == "{a=[b, null, ], c=[]}"


NAMES = st.text(st.characters(categories=["L", "N"], include_characters="_-. "), min_size=1, max_size=6).filter(
    lambda name: name.strip() and name not in (".", "..")
)


@given(graphs(NAMES), st.data())
@settings(deadline=None, max_examples=150)
def test_any_graph_is_read_and_one_more_edge_back_is_refused(dag: dict[str, list[str]], data: st.DataObject) -> None:
    spec = parse_spec(yaml.safe_dump({"models": {}, "dag": dag}, sort_keys=False, allow_unicode=True))
    place = {name: number for number, name in enumerate(spec.order)}
    assert set(place) == set(spec.nodes) == set(dag) | {name for names in dag.values() for name in names}
    for name, node in spec.nodes.items():
        assert list(node.successors) == dag.get(name, [])
        assert all(place[parent] < place[name] and name in spec.nodes[parent].successors for parent in node.parents)
    assert [name for name, node in spec.nodes.items() if not node.parents] == [spec.start]
    assert spec.leaves == tuple(name for name, node in spec.nodes.items() if not node.successors)
    back = data.draw(st.sampled_from(spec.order))
    ahead = data.draw(st.sampled_from(spec.order[: place[back] + 1]))
    reachable = {back} | {name for name in spec.order if _reaches(spec.nodes[name].successors, back, spec.nodes)}
    if ahead in reachable:
        with pytest.raises(InvalidDag):
            parse_spec(
                yaml.safe_dump({"models": {}, "dag": {**dag, back: [*dag.get(back, []), ahead]}}, sort_keys=False)
            )


def _reaches(successors: tuple[str, ...], name: str, nodes: dict[str, object]) -> bool:
    return name in successors or any(_reaches(nodes[child].successors, name, nodes) for child in successors)  # type: ignore[attr-defined]


YAML_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["models", "dag", "options"]), YAML_VALUES) | YAML_VALUES)
@settings(deadline=None, max_examples=200)
def test_whatever_stands_in_the_file_it_is_a_specification_or_a_refusal(content: object) -> None:
    try:
        parse_spec(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    except (InvalidDag, InvalidWorkflow) as error:
        assert error.message


@given(st.text(max_size=60))
@settings(deadline=None, max_examples=200)
def test_any_text_is_a_specification_or_a_refusal(text: str) -> None:
    with pytest.raises((InvalidDag, InvalidWorkflow)):
        parse_spec(text)

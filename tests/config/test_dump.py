"""A resolved configuration is written so that loading it gives the same stages again."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from siirl.config import dump, load
from siirl.config.yaml import dump_yaml

text = st.text(max_size=8) | st.sampled_from(
    ["1e-3", "on", "010", "12:30", "null", "~", "{prompt}=", "- a", "a: b", "'"]
)
algorithm = st.fixed_dictionaries(
    {}, optional={"kl_coef": st.floats(0, 10), "epochs": st.integers(1, 9), "dual_clip": st.none() | st.floats(1.5, 9)}
)
stage = st.fixed_dictionaries(
    {},
    optional={
        "pipeline": st.sampled_from(["grpo", "sft", "ppo"]),
        "algorithm": algorithm,
        "training": st.fixed_dictionaries(
            {}, optional={"steps": st.integers(1, 9), "lr": st.floats(0, 1), "max_grad_norm": st.none() | st.just(2.0)}
        ),
        "rollout": st.fixed_dictionaries({}, optional={"stop": st.lists(text, max_size=3)}),
        "data": st.fixed_dictionaries({}, optional={"system_prompt": st.none() | text, "prompt_template": text}),
        "reward": st.fixed_dictionaries(
            {}, optional={"params": st.dictionaries(text, text | st.integers(), max_size=2)}
        ),
    },
)


@settings(deadline=None, max_examples=60)
@given(main=stage, warmup=st.lists(stage, max_size=2), overrides=stage)
def test_what_is_dumped_loads_back_to_the_same_stages(
    main: dict[str, Any], warmup: list[dict[str, Any]], overrides: dict[str, Any]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        recipe, copy = Path(folder) / "recipe.yaml", Path(folder) / "elsewhere" / "config.yaml"
        recipe.write_text(dump_yaml({**main, "warmup": warmup}))
        resolved = load(recipe, overrides)
        copy.parent.mkdir()
        copy.write_text(dump(resolved))
        assert load(copy).stages == resolved.stages


def test_one_stage_alone_can_be_dumped_too(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("seed: 3\npipeline: ppo\nwarmup: [{pipeline: sft}]\n")
    for name, config in [(s.name, s.config) for s in load(tmp_path / "r.yaml").stages]:
        file = tmp_path / f"{name}.yaml"
        file.write_text(dump(config))
        assert load(file).main == config

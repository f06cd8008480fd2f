"""A layout is what its text says, and a size that it does not divide is refused in words or stays whole."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import P
from jax.sharding import AbstractMesh, AxisType

from attnax import Layout, TransformerConfig, TransformerLM
from attnax.nn.axes import parameter_axes, parameter_shardings
from attnax.sharding import AXES, check_batch_size, check_layout, constrain, gather, partition

CONFIG = TransformerConfig(vocab_size=17, d_model=12, num_heads=6, num_kv_heads=3, d_ff=18, num_layers=2, max_len=8)


def mesh_of(**sizes):
    sizes = tuple(sizes.get(name, 1) for name in AXES)
    return AbstractMesh(sizes, AXES, (AxisType.Auto,) * len(AXES))


class TestLayout:
    @pytest.mark.parametrize(
        ("text", "sizes"),
        [
            ("fsdp=4,tensor=2", {"fsdp": 4, "tensor": 2}),
            ("data", {"data": 8}),
            ("tensor", {"tensor": 8}),
            ("tensor=2", {"tensor": 2, "fsdp": 4}),
            ("data=-1, tensor = 2", {"data": 4, "tensor": 2}),
            ("data=2,fsdp=1,context=4", {"data": 2, "context": 4}),
        ],
    )
    def test_a_text_gives_the_sizes(self, text, sizes):
        layout = Layout.parse(text).sized(8)
        assert dataclasses.asdict(layout) == dict.fromkeys(AXES, 1) | sizes
        assert Layout.parse(str(layout)).sized(8) == layout
        assert dict(layout.mesh(jax.devices()[:8]).shape) == {name: getattr(layout, name) for name in AXES}

    def test_the_rest_goes_without_saying(self):
        texts = "data", "fsdp", "tensor=2", "data=4,tensor=2", "data=-1,tensor=2", "fsdp=2"
        assert [str(Layout.parse(text)) for text in texts] == list(texts)

    @pytest.mark.parametrize("text", ["", "fsdp=", "fsdp=two", "fsdp=2,fsdp=4", "model=2", "fsdp=2;tensor=2"])
    def test_another_text_is_refused(self, text):
        with pytest.raises(ValueError, match="a layout is written like fsdp=4,tensor=2"):
            Layout.parse(text)

    def test_sizes_that_are_none_are_refused(self):
        with pytest.raises(ValueError, match="tensor must be a number of devices, or -1 for the rest; got 0"):
            Layout(tensor=0)
        with pytest.raises(ValueError, match="at most one axis takes the rest of the devices; got -1 for data and"):
            Layout(data=-1)

    def test_sizes_must_multiply_to_the_devices(self):
        with pytest.raises(ValueError, match="fsdp=4,tensor=4 needs 16 devices; got 8 devices"):
            Layout(fsdp=4, tensor=4).mesh(jax.devices()[:8])
        with pytest.raises(ValueError, match="tensor=3 needs a multiple of 3; got 8 devices"):
            Layout(tensor=3).sized(8)


class TestRules:
    def test_an_axis_is_cut_where_its_devices_divide_it(self):
        mesh = mesh_of(fsdp=2, tensor=3)
        assert partition(mesh, (12, 18), ("embed", "hidden")) == P("fsdp", "tensor")
        assert partition(mesh, (7, 12, 18), ("embed", "hidden")) == P(None, "fsdp", "tensor")  # layers of a scan
        assert partition(mesh, (17, 12), ("vocab", "embed")) == P(None, "fsdp")
        assert partition(mesh, (12, 12), ("embed", ("heads", 2))) == P("fsdp", None)  # 12 features of 2 whole heads
        assert partition(mesh, (12, 18), ("embed", "hidden"), without=("fsdp",)) == P(None, "tensor")
        assert partition(mesh_of(data=2, fsdp=3), (12,), ("batch",)) == P(("data", "fsdp"))

    def test_a_batch_is_cut_by_the_axes_that_divide_it(self):
        mesh = mesh_of(data=2, fsdp=4)
        assert [partition(mesh, (size,), ("batch",)) for size in (8, 4, 6, 3)] == [
            P(("data", "fsdp")),
            P("data"),
            P("data"),
            P(None),
        ]

    def test_one_axis_of_devices_cuts_one_axis_of_a_parameter(self):
        class Own(nnx.Module):
            def __init__(self):
                self.mixer = nnx.Param(jnp.zeros((2, 3)), axes=("heads", "hidden"))

        with pytest.raises(ValueError, match="cuts one axis of a parameter; got mixer with axes="):
            parameter_axes(nnx.state(Own(), nnx.Param))

    def test_a_name_that_is_no_rule_is_refused(self):
        class Own(nnx.Module):
            def __init__(self):
                self.mixer = nnx.Param(jnp.zeros((2, 3)), axes=("embeds", None))

        with pytest.raises(ValueError, match="an axis is None or one of batch, length, .*; got 'embeds' of mixer"):
            parameter_axes(nnx.state(Own(), nnx.Param))

    def test_a_mesh_that_is_none_of_a_layout_is_refused(self):
        params = nnx.eval_shape(lambda: nnx.state(TransformerLM(nnx.Rngs(0), CONFIG), nnx.Param))
        with pytest.raises(ValueError, match="mesh must be that of a layout; got the axes"):
            parameter_shardings(params, jax.make_mesh((2,), ("data",)))
        wrong = AbstractMesh((2, 1, 1, 1, 1), AXES[::-1], (AxisType.Auto,) * 5)
        with jax.sharding.use_abstract_mesh(wrong), pytest.raises(ValueError, match="in the order data, fsdp, expert"):
            constrain(jnp.zeros((2, 2)), "batch", None)

    def test_a_matrix_without_axes_is_refused_by_name(self):
        class Own(nnx.Module):
            def __init__(self, rngs):
                self.mixer = nnx.Linear(3, 5, rngs=rngs)

        with pytest.raises(ValueError, match=r"every matrix must state its axes; got mixer.kernel of shape \(3, 5\)"):
            parameter_axes(nnx.eval_shape(lambda: nnx.state(Own(nnx.Rngs(0)), nnx.Param)))

    def test_axes_that_are_too_few_are_refused(self):
        class Own(nnx.Module):
            def __init__(self):
                self.mixer = nnx.Param(jnp.zeros((2, 3)), axes=("embed",))

        with pytest.raises(ValueError, match=r"states each of its axes; got mixer of shape \(2, 3\) with axes="):
            parameter_axes(nnx.state(Own(), nnx.Param))

    def test_scanned_layers_are_cut_like_the_others(self):
        def cuts(scan):
            config = dataclasses.replace(CONFIG, scan_layers=scan)
            params = nnx.eval_shape(lambda: nnx.state(TransformerLM(nnx.Rngs(0), config), nnx.Param))
            shardings = parameter_shardings(params, Layout(fsdp=2, tensor=3, data=1).mesh(jax.devices()[:6]))
            return {path[-2:]: sharding.get_raw_value().spec for path, sharding in nnx.to_flat_state(shardings)}

        scanned = cuts(True)
        for path, spec in cuts(False).items():
            assert scanned[path] in (spec, P(None, *spec))


class TestCheck:
    @pytest.mark.parametrize(
        ("layout", "fields", "message"),
        [
            ({"tensor": 4}, {}, "tensor must divide num_heads; got tensor=4, num_heads=6"),
            ({"tensor": 6}, {"d_ff": 20}, "tensor must divide d_ff; got tensor=6, d_ff=20"),
            (
                {"tensor": 2},
                {},
                "divide num_kv_heads, or be a multiple of it; got tensor=2, num_kv_heads=3",
            ),
            ({"fsdp": 5}, {}, "fsdp must divide d_model; got fsdp=5, d_model=12"),
            ({"expert": 2}, {}, "expert cuts the experts of a mixture; got expert=2 for a model without any"),
            (
                {"expert": 4},
                {"layer_pattern": ({"num_experts": 6}, {"num_experts": 8})},
                "divide the number of experts; got expert=4, num_experts=6",
            ),
            ({"context": 2}, {"attention_type": "standard"}, "context=2, attention_type='standard'"),
            (
                {"expert": 3},
                {"num_experts": 4},
                "divide the number of experts; got expert=3, num_experts=4",
            ),
            ({"context": 2}, {"attention_type": "linear"}, "context=2, attention_type='linear'"),
        ],
        ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
    )
    def test_what_does_not_divide_is_named(self, layout, fields, message):
        config = dataclasses.replace(CONFIG, **fields)
        with pytest.raises(ValueError, match=message):
            check_layout(config, Layout(**{"fsdp": 1} | layout))

    def test_layers_of_a_pattern_are_checked_too(self):
        config = dataclasses.replace(CONFIG, layer_pattern=({}, {"d_ff": 20}))
        with pytest.raises(ValueError, match="tensor must divide d_ff; got tensor=3, d_ff=20"):
            check_layout(config, Layout(fsdp=1, tensor=3))

    def test_a_batch_that_is_not_divided_is_named(self):
        with pytest.raises(ValueError, match="must divide the batch; got 12 of data=2,fsdp=3,expert=2,tensor=5 and"):
            check_batch_size(30, Layout(data=2, fsdp=3, expert=2, tensor=5))
        check_batch_size(24, Layout(data=2, fsdp=3, expert=2, tensor=5))

    def test_what_divides_is_taken(self):
        check_layout(CONFIG, Layout(fsdp=4, tensor=6, context=2))
        check_layout(dataclasses.replace(CONFIG, num_experts=4, top_k=2), Layout(fsdp=2, expert=4))


def test_without_a_layout_nothing_changes_an_array():
    x = jax.device_put(np.ones((2, 3), np.float32))
    other = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    for mesh in (jax.sharding.AbstractMesh((), ()), other.abstract_mesh):
        with jax.sharding.use_abstract_mesh(mesh):
            assert constrain(x, "batch", "embed") is x and gather(x, "embed", "hidden") is x


def test_outside_of_jit_an_array_goes_where_the_rules_say():
    mesh = Layout(fsdp=2, tensor=2).mesh(jax.devices()[:4])
    with jax.set_mesh(mesh):
        x = constrain(jax.device_put(np.ones((2, 3, 4), np.float32), jax.devices()[0]), "batch", "length", "hidden")
    assert x.sharding.spec == P("fsdp", None, "tensor")


def test_a_gathered_parameter_is_whole_and_its_gradient_is_cut():
    mesh = Layout(fsdp=2, tensor=2).mesh(jax.devices()[:4])
    x = jax.device_put(np.ones((4, 6), np.float32), jax.NamedSharding(mesh, P("fsdp", "tensor")))

    @jax.jit
    def both(x):
        whole, pull = jax.vjp(lambda x: gather(x, "embed", "hidden"), x)
        return whole, pull(whole)[0]

    with jax.set_mesh(mesh):
        whole, gradient = both(x)
    assert whole.sharding.spec == P(None, "tensor") and gradient.sharding.spec == P("fsdp", "tensor")

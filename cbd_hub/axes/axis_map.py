"""The axis map: what is known of a model family, as data.

An :class:`AxisMap` says for every parameter-name pattern how the tensor is laid out along named axes (see
:mod:`cbd_hub.axes.grammar`); ``*`` in a name is the layer axis. Beside that it names the config field of every axis,
the norms and which tensors read their output, and the few config switches that add tensors. Shapes, exact parameter
counts, subsetting, expansion, interpolation, size solving and checks of checkpoints all follow from it.

Everything fails closed: a checkpoint key that no pattern (or more than one) matches, and a config field that is
neither handled nor at its default, are refused.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, lru_cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from cbd_hub.axes.grammar import Layout, Part, parse, product
from cbd_hub.errors import AxisMapError, did_you_mean

__all__ = ["WITHOUT_EFFECT", "AxisMap"]

WITHOUT_EFFECT = frozenset(
    "_name_or_path architectures dtype torch_dtype transformers_version id2label label2id num_labels "
    "problem_type return_dict output_attentions output_hidden_states output_attention use_cache "
    "cache_implementation initializer_range init_std bos_token_id eos_token_id pad_token_id sep_token_id "
    "decoder_start_token_id chunk_size_feed_forward attention_dropout hidden_dropout classifier_dropout "
    "dropout resid_pdrop embd_pdrop attn_pdrop layerdrop max_position_embeddings "
    "auto_map tokenizer_class _num_labels tie_word_embeddings "
    "model_type is_llama_config transformers.js_config unsloth_fixed task_specific_params cbd_hub "
    "_attn_implementation attn_implementation _attn_implementation_internal _experts_implementation "
    "reorder_and_upcast_attn prefix".split()
)
"""Config fields that leave the tensors and the function alone in every family."""

_FREE = WITHOUT_EFFECT | frozenset(
    "rms_norm_eps layer_norm_eps layer_norm_epsilon rope_parameters rope_theta rope_scaling rope_local_base_freq "
    "partial_rotary_factor hidden_act hidden_activation activation_function".split()
)
"""Config fields that leave the tensors, and the way widths and layers enter the maths, alone in every family."""


@lru_cache(maxsize=1024)
def _regex(pattern: str) -> re.Pattern[str]:
    """Compiles a name pattern; ``*`` is a layer number as it is written in names (no sign, no leading zero)."""
    return re.compile(re.escape(pattern).replace(r"\*", "(0|[1-9][0-9]{0,5})"))


@dataclass(frozen=True)
class AxisMap:
    """The layout of every tensor of a model family.

    A map as written in :mod:`cbd_hub.axes.architectures` may hold lines such as ``"hidden if attention_bias"``;
    :meth:`resolve` settles them for one config. Everything but :meth:`resolve` expects a resolved map.
    """

    model_type: str
    """The ``model_type`` of the transformers config."""
    tensors: dict[str, str]
    """Parameter-name pattern → axis string, in stored order; may end in ``if FIELD`` or ``if not FIELD``."""
    fields: dict[str, str]
    """Config field → the axis, or the product of axes, that it states."""
    norms: dict[str, tuple[str, ...]]
    """Pattern of every norm gain → patterns of the tensors that read its output; empty where the norm is followed
    by no matrix (q/k norms, norms of a block's output), which rules out rotating the residual stream."""
    norm: str = "rms"
    """``rms`` (gain w), ``rms+1`` (gain 1 + w) or ``layer`` (LayerNorm: gain and bias)."""
    tied: dict[str, str] = field(default_factory=dict)
    """Name of a tensor that is not stored when ``tie_word_embeddings`` → the tensor it equals."""
    equal: dict[str, str] = field(default_factory=dict)
    """Axis → a product of axes it must equal (GPT-2: hidden = heads x head_dim)."""
    divides: dict[str, str] = field(default_factory=dict)
    """Axis → a product of axes that must divide it."""
    defaults: dict[str, str] = field(default_factory=dict)
    """Axis → the product of axes it is where the config leaves its field empty (GPT-2: ffn = 4 hidden)."""
    layer_lists: tuple[str, ...] = ()
    """Config fields that hold one entry a layer."""
    scaled: tuple[str, ...] = ()
    """Patterns whose output is multiplied by sqrt(hidden) in the forward pass (Gemma's embedding)."""
    free: tuple[str, ...] = ()
    """Further config fields that change neither tensors nor how sizes enter the maths."""
    in_out: bool = False
    """True where matrices are stored (in, out), as GPT-2's Conv1D does; False for nn.Linear's (out, in)."""
    prefix: str = ""
    """Prefix that older checkpoints of the family leave out of their keys."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Key in checkpoints → parameter name in transformers, where the two differ."""
    ignored: tuple[str, ...] = ()
    """Patterns of keys that old checkpoints hold though they are no parameters (causal masks)."""
    frozen: tuple[str, ...] = ("vocab", "head_dim", "positions")
    """Axes that never change along a chain (permuting head_dim would break rotary pairs)."""

    def __post_init__(self) -> None:
        if self.norm not in ("rms", "rms+1", "layer"):
            raise AxisMapError(f"axis map {self.model_type!r}: norm is {self.norm!r}; allowed: rms, rms+1, layer")
        for pattern, text in self.tensors.items():
            if pattern.count("*") > 1:
                raise AxisMapError(f"axis map {self.model_type!r}: {pattern!r} has more than one '*'")
            parse(text.split(" if ")[0])
        for group in (self.norms, self.scaled, *self.norms.values()):
            for pattern in group:
                if pattern not in self.tensors and pattern not in self.tied:
                    hint = did_you_mean(pattern, self.tensors)
                    raise AxisMapError(f"axis map {self.model_type!r}: {pattern!r} is not among its tensors.{hint}")

    # -- tensors --------------------------------------------------------------------------------------------------

    def layout(self, pattern: str) -> Layout:
        """Returns the parsed layout of one pattern."""
        return parse(self.tensors[pattern])

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """All axes of the map, the layer axis first."""
        names = {"layers": None} | {a: None for p in self.tensors for a in sorted(self.layout(p).axes)}
        return tuple(names)

    def names(self, sizes: Mapping[str, int]) -> Iterator[tuple[str, str, int | None]]:
        """Yields (parameter name, pattern, layer or None) for every stored tensor of a model of these sizes."""
        for pattern in self.tensors:
            if "*" in pattern:
                for layer in range(sizes["layers"]):
                    yield pattern.replace("*", str(layer)), pattern, layer
            else:
                yield pattern, pattern, None

    def shapes(self, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every stored tensor of a model of these sizes.

        Raises:
            AxisMapError: An axis has no size.
        """
        return {name: self.layout(pattern).shape(sizes) for name, pattern, _ in self.names(sizes)}

    @cached_property
    def _matchers(self) -> list[tuple[re.Pattern[str], str]]:
        return [(_regex(p), p) for p in self.tensors]

    def match(self, name: str) -> tuple[str, int | None]:
        """Returns the one pattern that matches a parameter name, and its layer.

        Raises:
            AxisMapError: No pattern matches, or more than one.
        """
        matches = [(p, m) for regex, p in self._matchers if (m := regex.fullmatch(name))]
        if len(matches) != 1:
            how = "no pattern" if not matches else "more than one pattern (" + ", ".join(p for p, _ in matches) + ")"
            raise AxisMapError(f"tensor {name!r} matches {how} of the axis map {self.model_type!r}")
        pattern, match = matches[0]
        return pattern, int(match.group(1)) if match.groups() else None

    def parameter_name(self, key: str) -> str | None:
        """Returns the parameter that a checkpoint key stores, or None for a key that is none (masks, tied copies)."""
        key = self.renamed.get(key, key)
        for candidate in (key, self.prefix + key) if self.prefix else (key,):
            if any(_regex(p).fullmatch(candidate) for p in self.ignored):
                return None
            if candidate in self.tied:
                return None
            if any(regex.fullmatch(candidate) for regex, _ in self._matchers):
                return candidate
        return key

    # -- roles along the residual stream ----------------------------------------------------------------------------

    def gain_of(self, pattern: str) -> str | None:
        """Returns the norm gain that a pattern is or belongs to (a LayerNorm bias), or None."""
        if pattern in self.norms:
            return pattern
        gain = pattern.removesuffix(".bias") + ".weight"
        return gain if pattern.endswith(".bias") and gain in self.norms else None

    def readers(self, gain: str) -> tuple[str, ...]:
        """Returns the stored tensors that read the output of a norm (a tied head is the embedding)."""
        return tuple(self.tied.get(p, p) for p in self.norms[gain] if self.tied.get(p, p) in self.tensors)

    @property
    def layers_name(self) -> str:
        """The module that holds the layers, e.g. ``model.layers``."""
        return next(pattern for pattern in self.tensors if "*" in pattern).split(".*")[0]

    def writes(self, pattern: str) -> bool:
        """Whether a tensor's output is added to the residual stream: embeddings, output projections, their biases."""
        dims, stream = self.layout(pattern).dims, (("hidden",),)
        if self.gain_of(pattern) is not None:
            return False
        if len(dims) == 1:
            return dims[0] == stream
        if "*" not in pattern:  # an embedding is looked up by row; a head reads the stream instead
            return dims[1] == stream and not any(pattern in readers for readers in self.norms.values())
        return dims[1 if self.in_out else 0] == stream

    def consumers(self, axis: str) -> list[str]:
        """Returns the matrices that read units of ``axis`` and write the residual stream (down_proj for ``ffn``)."""
        return [p for p in self.tensors if "*" in p and self.writes(p) and axis in self.layout(p).axes - {"hidden"}]

    def is_bent(self, pattern: str) -> bool:
        """Whether a control point bends a tensor: matrices of layers and every vector, not embeddings and heads."""
        return "*" in pattern or len(self.layout(pattern).dims) == 1

    def largest_rank(self, sizes: Mapping[str, int]) -> int:
        """Returns the smaller side of the smallest matrix that is bent: more would store more than the matrix."""
        shapes = [self.layout(p).shape(sizes) for p in self.tensors if self.is_bent(p)]
        return min((min(shape) for shape in shapes if len(shape) == 2), default=0)

    @property
    def rotatable(self) -> bool:
        """Whether the residual stream can be rotated exactly: RMSNorm whose every gain over it can be folded."""
        return self.norm != "layer" and all(
            self.norms[gain] for gain in self.norms if "hidden" in self.layout(gain).axes
        )

    # -- sizes ------------------------------------------------------------------------------------------------------

    def sizes(self, config: Any) -> dict[str, int]:
        """Reads the axis sizes from a transformers config (or a dict of its fields).

        Raises:
            AxisMapError: A field is missing or not a positive integer, or the sizes contradict each other.
        """
        get = config.get if isinstance(config, Mapping) else lambda k, d=None: getattr(config, k, d)
        known: dict[str, int] = {}
        open_products: list[tuple[str, tuple[Any, ...], int]] = []
        for name, expression in self.fields.items():
            value = get(name, None)
            if value is None:
                continue  # derived below, or reported as missing
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise AxisMapError(f"config field {name!r} is {value!r}; expected a positive integer")
            part = parse(expression).dims[0][0]
            open_products.append((name, part, value))
        open_products += [(axis, self._part(self.equal[axis]), -1) for axis in self.equal]
        open_products += [("head_dim", ("head_dim",), -2)]
        for name, part, value in sorted(open_products, key=lambda item: (item[2] < 0, len(item[1]))):
            if value == -1:
                value = known.get(name, 0)
            elif value == -2:  # the families' own default where a config states no head_dim
                if "head_dim" in known or "head_dim" not in self.axes:
                    continue
                value = known.get("hidden", 0) // product(self._part(self.heads), known)
            unknown = [axis for axis in part if axis not in known]
            rest = product(tuple(a for a in part if a in known), known)
            if len(unknown) > 1 or not rest or value % rest or (not unknown and value != rest):
                raise AxisMapError(
                    f"config field {name!r} is {value}; it must be {' x '.join(map(str, part))} "
                    f"(known: {', '.join(f'{a}={known[a]}' for a in part if a in known) or 'none'})"
                )
            if unknown:
                known[str(unknown[0])] = value // rest
        for axis, text in self.defaults.items():
            known.setdefault(axis, product(self._part(text), known))
        if missing := [axis for axis in self.axes if axis not in known]:
            raise AxisMapError(
                f"config of {self.model_type!r} does not give the size of {', '.join(missing)}; "
                f"it is read from the fields {', '.join(self.fields)}"
            )
        self.check_sizes(known)
        return known

    @staticmethod
    def _part(text: str) -> Part:
        return parse(f"({text})").dims[0][0]

    @property
    def heads(self) -> str:
        """The axes whose product is the number of query heads."""
        return "kv_heads q_per_kv" if "kv_heads" in self.axes else "heads"

    def config_fields(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Returns the config fields that state these sizes (the inverse of :meth:`sizes`).

        Raises:
            AxisMapError: An axis has no size.
        """
        return {name: product(parse(text).dims[0][0], sizes) for name, text in self.fields.items()}

    def check_sizes(self, sizes: Mapping[str, int]) -> None:
        """Checks what transformers demands of the sizes.

        Raises:
            AxisMapError: The sizes break a rule of the family; the message says which.
        """
        for axis, text in self.equal.items():
            if sizes[axis] != product(self._part(text), sizes):
                raise AxisMapError(
                    f"{axis} = {sizes[axis]} must equal {text.replace(' ', ' x ')} in {self.model_type}"
                )
        for axis, text in self.divides.items():
            if sizes[axis] % product(self._part(text), sizes):
                raise AxisMapError(
                    f"{axis} = {sizes[axis]} must be a multiple of {text.replace(' ', ' x ')} = "
                    f"{product(self._part(text), sizes)} in {self.model_type}"
                )

    # -- configs ----------------------------------------------------------------------------------------------------

    def resolve(self, config: Any) -> "AxisMap":
        """Settles the map for one config: drops lines whose condition does not hold, and tied tensors.

        Raises:
            AxisMapError: The config has a field that is neither handled by the map nor at its default.
        """
        values = config.to_dict()
        tied = self.tied if getattr(config, "tie_word_embeddings", False) else {}
        tensors, switches = {}, set()
        for pattern, text in self.tensors.items():
            layout, _, condition = text.partition(" if ")
            switch = condition.removeprefix("not ")
            switches.add(switch)
            if pattern in tied or (switch and bool(values.get(switch, False)) == condition.startswith("not ")):
                continue
            tensors[pattern] = layout
        handled = _FREE | switches | set(self.free) | set(self.fields) | set(self.layer_lists)
        default = type(config)().to_dict()
        unhandled = {
            name: value
            for name, value in values.items()
            # what the config class does not declare never reaches the code of the model: tools leave notes there
            if name in default and name not in handled and value != default[name]
        }
        if unhandled:
            name = next(iter(unhandled))
            listed = ", ".join(f"{n} = {v!r} (default: {default[n]!r})" for n, v in unhandled.items())
            raise AxisMapError(
                f"the axis map {self.model_type!r} does not handle {listed}.{did_you_mean(name, handled)} "
                "What changes no tensor and no maths that depends on sizes can be listed in the map's `free` fields; "
                "otherwise the family needs its own map."
            )
        norms = {g: r for g, r in self.norms.items() if g in tensors}
        return replace(self, tensors=tensors, tied=dict(tied), norms=norms)

    def to_dict(self) -> dict[str, Any]:
        """Returns the map as plain JSON values; :meth:`from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "AxisMap":
        """Reads a map from plain values (a manifest, a recipe).

        Raises:
            AxisMapError: Unknown keys, or a map that is not well formed.
        """
        known = {f.name for f in fields(cls)}
        for key in data:
            if key not in known:
                raise AxisMapError(f"axis map has no field {key!r}.{did_you_mean(str(key), known)}")
        try:
            return TypeAdapter(cls).validate_python(dict(data))
        except ValidationError as error:
            first = error.errors()[0]
            place, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
            raise AxisMapError(f"axis map field {place}: {message}" if place else message) from None

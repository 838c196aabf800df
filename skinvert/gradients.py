"""Per-sample gradients as a scikit-learn transformer: rows (X, y) -> (n, p), or X -> (n c, p) of c outputs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import scipy.sparse
import torch
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted

from ._autograd import ordinary
from ._callbacks import TakesCallbacks, followed
from ._check import check_number, must_be
from ._fitting import SharesModel, as_it_is, fit_whole
from ._frames import Columned, Frame, RowTransformer, check_inputs, columns_of, rows_of
from ._lazy import is_lazy, over_rows
from ._memory import check_memory, rows_within
from ._progress import progress
from ._shown import Shown
from ._types import Array, Batch, Data, Device, DType, Globs, LossLike, TrainedModel
from .curvature import Objective, gradient_rows, jacobian_rows, split_batch, warn_of_unreached
from .data import Batches, batches_of, check_form, holds_tensors, own_steps, with_any_targets
from .models import TorchTwiceDifferentiable, as_margin, as_model, as_outputs, is_model

__all__ = ["PerSampleGradient"]


class PerSampleGradient(TakesCallbacks, Shown, SharesModel, RowTransformer):
    r"""Map rows (X, y) to their loss gradients gᵢ = ∇ℓᵢ(θ), one per row; the penalty is left out.

    ``fit`` records the scale κ = Σ w / Σ w m of the training loss (1/c for ``mse``, the mean class weight for weighted
    cross-entropy), so that the mean of the training rows' gᵢ is the gradient of the training loss.

    Parameters
    ----------
    model : nn.Module, skorch net, fitted scikit-learn model or TorchTwiceDifferentiable
        A trained model; shared by clones, never copied, never changed.
    loss : str, torch loss module or callable, default=None
        As for ``HessianInverter``. ``"margin"``, for classifiers of any kind, is log(p / (1 − p)) of the true class's
        probability p, which TRAK linearises; a bare module's outputs are logits. ∇ℓᵢ = −(1 − pᵢ) ∇marginᵢ for the
        cross-entropy ℓ: the weights 1 − pᵢ come from ``predict_proba``, or a softmax of the outputs. ``"output"`` is
        no loss: the c outputs themselves, one after the other in their own order, with row i c + k the gradient of
        output k of row i. Targets do not count there: ``fit(X)``, ``transform(X)``; κ is 1. The outputs are those that
        the loss takes, so of a scikit-learn classifier its logits.
    params : str or list of str, default=None
        Globs on parameter names; None selects all that require a gradient.
    batch_size : int, default=None
        Rows per pass; results do not depend on it.
    device, dtype : default=None
        None is the model's own.
    verbose : int, default=0
        1 shows a progress bar.

    Attributes
    ----------
    n_features_out_ : int
        p, the number of selected parameters.
    loss_scale_ : float
        κ.
    parameter_names_ : list of str
        Of the selected parameters.

    References
    ----------
    Park, Georgiev, Ilyas, Leclerc & Madry (2023), "TRAK: Attributing model behavior at scale", for the margin.

    Examples
    --------
    The gradient of (xᵀθ − y)² is 2 (xᵀθ − y) x.

    >>> net = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.zeros_(net.weight)
    >>> PerSampleGradient(net, loss="mse").fit_transform(np.eye(2, dtype="f4"), np.ones((2, 1), dtype="f4")).tolist()
    [[-2.0, -0.0], [-0.0, -2.0]]

    With an inverter behind it H is the empirical Fisher GᵀG / n, here 2I, to which λ = 2 is added. A random projection
    between them, and ``loss="margin"``, give TRAK's φ(z)ᵀ(ΦᵀΦ)⁻¹, times n; Φ itself is ``pipe[:-1].transform``.

    >>> from sklearn.pipeline import make_pipeline
    >>> from skinvert import HessianInverter
    >>> X, y = np.eye(2, dtype="f4"), np.ones((2, 1), dtype="f4")
    >>> pipe = make_pipeline(PerSampleGradient(net, loss="mse"), HessianInverter("direct", 2.0)).fit(X, y)
    >>> pipe.transform((X, y)).round(6).tolist()
    [[-0.5, 0.0], [0.0, -0.5]]

    The Jacobian of f = (θ₁x₁ + θ₂x₂, θ₃x₁ + θ₄x₂), two rows for each x:

    >>> jacobian = PerSampleGradient(torch.nn.Linear(2, 2, bias=False), loss="output")
    >>> jacobian.fit_transform(np.array([[1, 2], [3, 4]], dtype="f4")).tolist()
    [[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 1.0, 2.0], [3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 3.0, 4.0]]
    """

    def __init__(
        self,
        model: TrainedModel | None = None,
        *,
        loss: LossLike | None = None,
        params: Globs = None,
        batch_size: int | None = None,
        device: Device = None,
        dtype: DType = None,
        verbose: int = 0,
    ) -> None:
        self.model = model
        self.loss = loss
        self.params = params
        self.batch_size = batch_size
        self.device = device
        self.dtype = dtype
        self.verbose = verbose

    @followed
    @ordinary
    def fit(self, X: Data, y: Data | None = None, sample_weight: Array | None = None) -> PerSampleGradient:
        """Record the scale of the training loss; ``X, y`` as ``HessianInverter.fit`` takes them."""
        self._check_data(X, y)
        fit_whole(self, lambda fresh: fresh._fit(X, y, sample_weight))
        return self

    def _fit(self, X: object, y: object, sample_weight: object) -> None:
        model = self._at_point()
        model.features = own_steps(model.features, with_any_targets(X if y is None else (X, y), model))
        objective = Objective(model, self._batches(model, X, y, sample_weight, hold=False), self.verbose)
        warn_of_unreached(objective.unreached)
        self.loss_scale_, self.n_features_out_ = 1.0 if self._is_of_outputs else objective.scale, model.num_params
        self.parameter_names_, self._layout = list(model.layout.names), model.layout
        self._totals, self._columns = model.totals, columns_of(X if y is None else (X, y))

    @ordinary
    def transform(self, X: Data, y: Data | None = None) -> Array:
        """Return the gradients (n, p) of ``(X, y)``, a tuple or two arguments (or a Dataset, a DataLoader, batches).

        For ``loss="output"`` they are (n c, p), and X alone will do. Arrays give an array. Tensors, and data sets and
        loaders of tensors, give a tensor on the model's device. A frame, where ``set_output`` asks for one, has the
        index of X. Dask arrays give a lazy one, whose blocks of rows are computed one by one, with losses alone.
        """
        data = X if y is None else (X, y)
        if is_lazy(data):
            return self._lazily(X, y)
        self._check_data(X, y)
        gradients, counts = self._gradients(data)
        rows = rows_of(data)
        if isinstance(rows, Frame) and self._is_of_outputs:
            # As many with each label as the row has outputs.
            rows = rows.iloc[np.repeat(np.arange(len(rows)), counts)]
        return super().transform(rows, gradients)

    def _lazily(self, X: Data, y: Data | None) -> Array:
        check_is_fitted(self, "loss_scale_")
        if self._is_of_outputs:
            hint = "Their number of rows is known when they are computed: try `map_blocks`."
            raise TypeError(must_be('Data for loss="output"', "in memory", "Dask arrays", hint))
        self._check_data(X, y)
        data = X if y is None else (X, y)
        check_form(data)
        point = self._at_point()
        name = str(point.dtype).removeprefix("torch.")
        # Rows in memory are mapped at the θ of the call; the blocks, at that of this one, whenever they are computed.
        # Nothing of the user's model goes with it; that it uses no tensor of theirs, `fit` has seen.
        point.model, point.watch = point.module, None
        kept = as_it_is(self)
        kept.model, kept._point = None, point
        return over_rows(kept, "transform", data, self.n_features_out_, np.dtype(name))

    def _gradients(self, X: object) -> tuple[Array, list[int]]:
        """Return the gradients, and how many of them each row of the data has."""
        check_is_fitted(self, "loss_scale_")
        model = self._at_point()
        model.adopt(self._totals)
        batches = self._batches(model, X, None, None)
        check_inputs(X, self._columns)
        counts = _outputs_of(model, batches) if self._is_of_outputs else [1] * batches.n_samples
        way_out = "Try fewer rows at a time, or fewer parameters with `params`."
        # Measured: what the passes leave to the allocator comes to some 0.4 of the rows.
        needed = int(1.4 * sum(counts) * model.num_params * model.dtype.itemsize)
        what = "output of each of" if self._is_of_outputs else "each of"
        check_memory(needed, f"A gradient for {what} {batches.n_samples:,} rows", way_out, model.device)
        gradients = torch.empty(sum(counts), model.num_params, dtype=model.dtype, device=model.device)
        chunk, start = rows_within(3 * max(counts) * model.num_params * model.dtype.itemsize), 0
        for batch, weights in progress(batches, "per-sample gradients", self.verbose):
            for rows, _ in split_batch(batch, weights, chunk):
                part = self._rows(model, rows)
                gradients[start : start + len(part)] = part
                start += len(part)
        return gradients if holds_tensors(X) else gradients.cpu().numpy(), counts

    def _rows(self, model: TorchTwiceDifferentiable, rows: Batch) -> torch.Tensor:
        """Return the gradients (m, p) of a few rows, or (m c, p) of their outputs."""
        if self._is_of_outputs:
            return jacobian_rows(model, rows).flatten(0, 1)
        return self.loss_scale_ * gradient_rows(model, rows)

    @ordinary
    def fit_transform(self, X: Data, y: Data | None = None, **fit_params: Array) -> Array:
        """Fit, and return the gradients of the same rows."""
        return self.fit(X, y, **fit_params).transform(X, y)

    def get_feature_names_out(self, input_features: object = None) -> np.ndarray:
        """Return the p names of the columns: ``"fc1.weight[0,3]"``."""
        check_is_fitted(self, "loss_scale_")
        return np.asarray(self._layout.feature_names(), dtype=object)

    def __sklearn_tags__(self) -> Tags:
        """Say that a target is needed, but for the outputs themselves.

        ``array_api_support`` stays False: what it takes are a model's inputs, and a module computes in torch. Tensors
        give tensors without it.
        """
        tags = super().__sklearn_tags__()
        tags.target_tags.required = not self._is_of_outputs
        tags.no_validation = True
        return tags

    def _facts(self) -> Mapping[str, object]:
        if "loss_scale_" not in vars(self):
            return {}
        return {
            "parameters p": f"{self.n_features_out_:,}",
            "rows are gradients of": "outputs" if self._is_of_outputs else "losses",
            "scale κ of the training loss": f"{self.loss_scale_:.4g}",
        }

    @property
    def _is_of_outputs(self) -> bool:
        return isinstance(self.loss, str) and self.loss == "output"

    def _check_data(self, X: object, y: object) -> None:
        _check_no_model(X, y)
        if not self._is_of_outputs:
            _check_pair(X, y)

    # The model at the θ at which lazy blocks are mapped; None where that is today's.
    _point: TorchTwiceDifferentiable | None = None

    def _at_point(self) -> TorchTwiceDifferentiable:
        if self._point is not None:
            self._point.check_unchanged()
            # Each block has its own copy, as each call has: blocks in threads would write to one.
            return self._point.at_point(self.params, self.dtype, self.device)
        margin = isinstance(self.loss, str) and self.loss == "margin"
        if self._is_of_outputs:
            model = as_outputs(self.model)
        else:
            model = as_margin(self.model) if margin else as_model(self.model, self.loss)
        if not isinstance(model, TorchTwiceDifferentiable):
            must = "one with per-sample losses"
            raise TypeError(must_be("model", must, type(model).__name__, "Subclass TorchTwiceDifferentiable."))
        return model.at_point(self.params, self.dtype, self.device)

    def _batches(
        self, model: TorchTwiceDifferentiable, X: object, y: object, sample_weight: object, hold: bool = True
    ) -> Batches:
        if self.batch_size is not None:
            check_number(self.batch_size, "batch_size", owner="PerSampleGradient", low=1, integer=True)
        data = (X, y) if y is not None else X
        return batches_of(
            model,
            with_any_targets(data, model) if self._is_of_outputs else data,
            batch_size=self.batch_size,
            sample_weight=sample_weight,
            needs_row_order=True,
            # `fit` takes sums of one pass: a stream that is drawn anew has them too.
            hold=hold,
        )


def _outputs_of(model: TorchTwiceDifferentiable, batches: Batches) -> list[int]:
    """Return the number of outputs of each row: of sequences it may differ from batch to batch."""
    counts: list[int] = []
    for batch, weights in batches:
        outputs = model.forward(batch)
        counts += [outputs[0].numel()] * len(weights)
    return counts


def _check_no_model(X: object, y: object) -> None:
    """Raise where a model came with the rows, as to ``HessianInverter.fit``."""
    if is_model(X) or is_model(y):
        X = X if is_model(X) else y
        hint = "The model is a setting: try `PerSampleGradient(model, loss=...).fit(X, y)`."
        raise TypeError(must_be("What PerSampleGradient is given", "(X, y)", f"a {type(X).__name__}", hint))


def _check_pair(X: Array, y: object) -> None:
    """Raise where rows came without their targets, as ``Pipeline.score`` passes them."""
    lazy = is_lazy(X) and not isinstance(X, Mapping | tuple)
    if y is None and (lazy or isinstance(X, np.ndarray | torch.Tensor | Frame | Columned) or scipy.sparse.issparse(X)):
        hint = (
            "A gradient needs the target: try `transform((X, y))`. `Pipeline.transform` and `Pipeline.score` pass X "
            "alone: try `pipe.transform((X, y))`, and `make_quadratic_scorer()` to score, in a search as `scoring=`."
        )
        raise TypeError(must_be("PerSampleGradient's data", "(X, y)", f"X of shape {tuple(X.shape)} alone", hint))

"""The estimator: ``HessianInverter().fit(model, data).transform(b)``."""

from __future__ import annotations

import copyreg
import numbers
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import scipy.sparse.linalg
import torch
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin, clone
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from ._arguments import check_fit_arguments, check_method
from ._autograd import ordinary
from ._fitting import clone_sharing, fit_whole
from ._frames import check_columns, check_inputs, columns_of, has_columns, refuse_parameters
from ._linear_map import apply_linear, solve_linear
from ._rows import Rows
from ._scaling import times_powers
from ._state import pack, unpack
from ._validation import (
    check_choice,
    check_hessian_perturbation,
    check_number,
    check_sample_weight,
    check_shift,
    must_be,
    resolve_device,
    resolve_dtype,
)
from .answers import OPTIONAL, answer, check_answer, file_fields
from .block_operators import BlockDiagonal
from .curvature import Gram, build_blocks, build_curvature, curvature_name, held_out_curvature, seeded_curvature
from .data import as_batches
from .methods.base import InverseOperator, Method, relative_residual
from .methods.blocks import invert_blocks
from .methods.spectrum import has_spectrum, spectrum
from .models import TorchTwiceDifferentiable, as_model, describe, fixed_at, is_model
from .operators import LinearOperator, Shifted, as_scipy
from .parameters import ParameterLayout, split_blocks
from .persistence import left_out, load_state, refusing_damage, require_present, save_state
from .registry import InversionRegistry, check_requirements, is_method
from .results import InverseHvpResult, Spectrum
from .scores import HeldOut, quadratic_score
from .sources import Samples

__all__ = ["HessianInverter", "load"]


class HessianInverter(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    r"""Solve (H + λI) x = b for a trained model's curvature H, one right-hand side per row.

    ``fit(model, data)``, ``fit(X, y)`` with ``model`` set, or ``fit(X)`` on plain rows, whose curvature is that of
    linear least squares, H = Σ wᵢxᵢxᵢᵀ / Σ wᵢ. The factorisation is done in ``fit``; the user's model is never changed.

    Parameters
    ----------
    method : str, InversionMethod or Method, default="auto"
        A name in the ``InversionRegistry`` or a configured instance, such as ``CG(rtol=1e-6)``.
    hessian_perturbation : float, default=0.0
        λ ≥ 0, on the scale of the mean loss.
    curvature : str or SampledFisher, default="auto"
        H: ``"hessian"``, ``"ggn"``, ``"fisher"``, ``"empirical_fisher"``, or ``"sampled_fisher"``, which is
        ``SampledFisher()``: one sampled label a row, at a cost that does not grow with the outputs. ``"auto"`` is the
        Hessian, save for methods that are defined on another curvature.
    model : nn.Module, skorch net, fitted scikit-learn model, Pipeline of these or TwiceDifferentiable, default=None
        What ``fit(X, y)`` reads, the form that pipelines and searches call. Shared by clones, never copied. In a
        pipeline that ends in this inverter ``fit`` and ``score`` run through its steps; right-hand sides, which are no
        inputs, go to the last one: ``pipe[-1].transform(b)``.
    loss : str, torch loss module or callable, default=None
        The loss of a bare module: ``"cross_entropy"``, ``"mse"``, ``"bce_with_logits"``, ``"nll"``, ``"huber"``,
        ``"poisson_nll"``, a torch loss module, or a callable (output, target) that is a mean or a sum over rows, or
        one value per row. None for a model that is given ``labels`` and returns its own ``loss`` beside ``logits``,
        as Hugging Face's are.
    weight_decay : float or mapping of str to float, default=0.0
        μ in ½ μ‖θ‖² of the training objective: part of H, not of λ. Or globs on parameter names and the μ of each, as
        an optimiser's parameter groups have them: ``{"*.weight": 1e-2}``. Where it is 0, a skorch net's optimiser
        gives its own if that is such a penalty; a decoupled one (AdamW) is warned of and left out.
    params : str or list of str, default=None
        Globs on parameter names; None selects all that require a gradient.
    blocks : {"layer", "parameter"} or mapping of str to globs, default=None
        Invert the block-diagonal part of H alone, each block by ``method``. A mapping's globs must put each selected
        parameter into exactly one block. ``residual`` still judges against the whole of H.
    batch_size : int, default=None
        Rows per batch; results do not depend on it. None is the loader's own, or 1,024.
    device : str or torch.device, default=None
        None is where the model is; "auto" a GPU when there is one.
    dtype : torch.dtype or numpy dtype, default=None
        float32 or float64; None is the model's own.
    random_state : int, RandomState or None, default=None
        For stochastic methods and curvatures.
    check_residual : bool, default=True
        Whether an approximate method spends one product with the exact curvature per solve to report its true
        ``residual`` and to warn where x = 0 would be better. False leaves ``residual`` NaN and ``converged`` False.
    verbose : int, default=0
        1 shows progress bars on long work.

    Attributes
    ----------
    n_features_in_ : int
        p, the width of a right-hand side.
    n_samples_ : int
        Number of training rows.
    method_ : Method or function
        What inverts.
    inverse_ : InverseOperator
        The fitted inverse.
    curvature_ : LinearOperator
        H. Neither pickled nor saved, as ``model``, ``loss`` and data, where the factorisation serves without it.
    curvature_name_ : str
        Which curvature; ``"gram"`` for plain rows.
    hessian_perturbation_ : float
        λ.
    parameter_names_ : list of str
        Of the selected parameters; model-based fits only.
    gradient_norm_ : float
        ‖∇L(θ)‖, small at a minimum; model-based fits only.
    eigenvalues_ : ndarray of shape (p,)
        Of H, ascending, where the method computed a spectrum.

    Examples
    --------
    Plain rows: H = XᵀX / n.

    >>> import numpy as np
    >>> X = np.array([[2.0, 0.0], [0.0, 2.0]])
    >>> HessianInverter("direct", hessian_perturbation=2.0).fit(X).transform(np.array([[4.0, 8.0]]))
    array([[1., 2.]])

    A module: mse's Hessian is 2 XᵀX / n.

    >>> net = torch.nn.Linear(2, 1, bias=False)
    >>> inverter = HessianInverter("cg", loss="mse").fit(net, (torch.eye(2), torch.zeros(2, 1)))
    >>> inverter.transform(torch.tensor([[1.0, 2.0]]))
    tensor([[1., 2.]])
    """

    def __init__(
        self,
        method: Any = "auto",
        hessian_perturbation: float = 0.0,
        *,
        curvature: Any = "auto",
        model: Any = None,
        loss: Any = None,
        weight_decay: Any = 0.0,
        params: Any = None,
        blocks: Any = None,
        batch_size: int | None = None,
        device: Any = None,
        dtype: Any = None,
        random_state: Any = None,
        check_residual: bool = True,
        verbose: int = 0,
    ) -> None:
        self.method = method
        self.hessian_perturbation = hessian_perturbation
        self.curvature = curvature
        self.model = model
        self.loss = loss
        self.weight_decay = weight_decay
        self.params = params
        self.blocks = blocks
        self.batch_size = batch_size
        self.device = device
        self.dtype = dtype
        self.random_state = random_state
        self.check_residual = check_residual
        self.verbose = verbose

    # -- fit -------------------------------------------------------------------------------------------------------

    @ordinary
    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> HessianInverter:
        """Fit the inverse of a model's curvature over data, or of plain rows.

        Parameters
        ----------
        X : model, array of shape (n, ...) or data
            A model, with its data as ``y``; else the inputs for ``self.model``; else plain rows (n, p).
        y : data or array of shape (n, ...), default=None
            ``(X, y)``, a Dataset, a DataLoader, batches or a list of samples after a model; targets after inputs. X
            may be a mapping, given to ``forward`` by name, or a tuple of inputs; a batch may be a mapping with
            ``"labels"``. What the memory holds is copied; larger data must be the same in every pass.
        sample_weight : array of shape (n,), default=None
            Weights wᵢ ≥ 0; weight 2 equals a row given twice.

        Returns
        -------
        HessianInverter
            Itself.
        """
        check_method(self.method)
        check_fit_arguments(X, y, self.model)
        shift = check_hessian_perturbation(self.hessian_perturbation, "HessianInverter")
        return fit_whole(self, lambda fresh: fresh._fit_at(X, y, sample_weight, shift))

    @ordinary
    def _fit_at(self, X: Any, y: Any, sample_weight: Any, shift: float) -> Any:
        """Fit at λ = ``shift``."""
        if self.batch_size is not None:
            check_number(self.batch_size, "batch_size", owner="HessianInverter", low=1, integer=True)
        check_choice(self.check_residual, "check_residual", [True, False])
        if is_model(X):
            A, blocks = self._model_curvature(X, y, sample_weight)
        elif self.model is not None:
            A, blocks = self._model_curvature(self.model, as_data(X, y), sample_weight)
        else:
            A, blocks = self._rows_curvature(X, y, sample_weight), None
        self._invert(A, blocks, shift)
        return self

    def _model_curvature(self, model: Any, data: Any, sample_weight: Any) -> Any:
        if data is None:
            raise ValueError(must_be("fit(model, data)'s data", "given", "None", "Try fit(model, (X, y))."))
        model, loss = require_present(model, "model"), require_present(self.loss, "loss")
        adapted: Any = as_model(model, loss, self.weight_decay)
        adapted = fixed_at(adapted, self.params, self.dtype, self.device)
        if isinstance(adapted, TorchTwiceDifferentiable):
            self._layout: ParameterLayout | None = adapted.layout
        else:
            shapes = tuple(tuple(parameter.shape) for parameter in adapted.parameters)
            self._layout = ParameterLayout(tuple(f"parameter{i}" for i in range(len(shapes))), shapes)
        method = self._method(type(adapted))
        default = getattr(method, "default_curvature", "hessian")
        chosen = default if self.curvature == "auto" else self.curvature
        chosen = seeded_curvature(chosen, self.random_state)
        self.curvature_name_ = curvature_name(chosen)
        batches = self._batches(adapted, data, sample_weight)
        A: Any = build_curvature(chosen, adapted, batches, self.verbose)
        self.gradient_norm_ = A.gradient_norm
        self.method_, self.n_samples_ = method, batches.n_samples
        self._model, self._data = adapted, data
        self.parameter_names_, self.n_features_in_ = list(self._layout.names), A.size
        if self.blocks is None:
            return A, None
        if not isinstance(method, Method):
            raise ValueError(must_be("blocks", "None for a method that is a function", repr(self.blocks)))
        members = split_blocks(self._layout.names, self.blocks)
        return A, build_blocks(chosen, adapted, batches, members, self.verbose)

    def _batches(self, adapted: Any, data: Any, sample_weight: Any) -> Any:
        read = adapted.read(data) if hasattr(adapted, "read") else data
        return as_batches(read, batch_size=self.batch_size, sample_weight=sample_weight, **describe(adapted))

    def _rows_curvature(self, X: Any, y: Any, sample_weight: Any) -> LinearOperator:
        home = X.device if isinstance(X, torch.Tensor) else torch.device("cpu")
        if isinstance(X, torch.Tensor):
            X = X.detach().cpu().numpy()
        X = validate_data(self, X, dtype=[np.float64, np.float32])
        weights = check_sample_weight(sample_weight, len(X))
        method = self._method(None)
        if self.blocks is not None:
            raise ValueError(must_be("blocks for plain rows", "None", repr(self.blocks), "They have no layers."))
        for name, default in (("loss", None), ("weight_decay", 0.0), ("params", None)):
            if y is not None and (given := getattr(self, name)) is not None and given != default:
                hint = "They have no model: is `model=` missing?"
                raise ValueError(must_be(f"{name} for plain rows", repr(default), repr(given), hint))
        if self.curvature not in ("auto", "gram"):
            hint = "Plain rows have one curvature, XᵀX/n. For a model's, give a model."
            raise ValueError(must_be("curvature for plain rows", "'auto'", repr(self.curvature), hint))
        rows = torch.from_numpy(np.array(X, order="C", copy=True))
        device = resolve_device(self.device, home)
        rows = rows.to(device, resolve_dtype(self.dtype, rows.dtype))
        self.method_, self.n_samples_, self.curvature_name_ = method, len(X), "gram"
        self._layout, self._model, self._data = None, None, None
        return Gram(rows, None if weights is None else torch.from_numpy(weights).to(rows))

    def _method(self, model_type: type | None) -> Any:
        """Return a configured method, or a registered function."""
        if isinstance(self.method, Method):
            return self._seeded(clone(self.method))
        found = InversionRegistry.get(model_type or TorchTwiceDifferentiable, self.method)
        if is_method(found):
            return self._seeded(found())
        if model_type is None:
            must = "a Method for plain arrays"
            raise ValueError(must_be("method", must, f"the function {self.method!r}, which wants a model"))
        return found

    def _seeded(self, method: Method) -> Method:
        """Pass the estimator's random state on to a stochastic method that has none of its own."""
        if self.random_state is not None and method.get_params().get("random_state", 0) is None:
            seed = check_random_state(self.random_state).randint(2**31 - 1)
            method.set_params(random_state=self.random_state if isinstance(self.random_state, int) else seed)
        return method

    def _invert(self, A: LinearOperator, blocks: BlockDiagonal | None, shift: float) -> None:
        self.curvature_, self.hessian_perturbation_ = A, check_shift(shift, A.dtype)
        self.inverse_: Any = None
        if isinstance(self.method_, Method):
            check_requirements(self.method_, A)
            if blocks is not None:
                self.inverse_ = invert_blocks(self.method_, blocks, shift, self.verbose).judged_by(A)
                return
            self.method_ = self.method_.choose(A, shift)
            self.inverse_ = self.method_.invert(A, shift, self.verbose)
            if getattr(self.inverse_, "eigenvalues", None) is not None:
                self.eigenvalues_ = self.inverse_.eigenvalues.cpu().numpy()

    # -- solve -----------------------------------------------------------------------------------------------------

    def transform(self, X: Any) -> Any:
        """Return the solutions of (H + λI) x = b.

        Parameters
        ----------
        X : array or tensor of shape (k, p)
            Right-hand sides b, one per row.

        Returns
        -------
        array or tensor of shape (k, p)
            x: a tensor for a tensor, of its dtype and device; an array for an array. Where b requires a gradient, x is
            differentiable by b, as often as wanted: H + λI is symmetric, and the backward pass is ``transform`` itself.
            The model, its data and λ are constants. Columns with names must be those of ``get_feature_names_out()``.
        """
        return self.solve(X).x

    @ordinary
    def fit_transform(self, X: Any, y: Any = None, **fit_params: Any) -> Any:
        """Fit plain rows and return the solutions for them.

        With a model the inputs are no right-hand sides: transform gradients instead.
        """
        if self.model is not None or is_model(X):
            hint = "Try `fit(X, y)`, then `transform(PerSampleGradient(model, loss=...).fit_transform(X, y))`."
            raise TypeError(must_be("fit_transform", "called on plain rows", "a model", hint))
        return self.fit(X, y, **fit_params).transform(X)

    def solve(self, b: Any) -> InverseHvpResult:
        """Return the solutions and what is known of them, ``x, info``.

        Parameters
        ----------
        b : array or tensor of shape (k, p)
            Right-hand sides, one per row.

        Returns
        -------
        InverseHvpResult
            ``x`` as ``transform`` returns it; ``info["residual"]`` (k,), ‖(H + λI)x − b‖ / ‖b‖ against the exact
            curvature, ``info["converged"]`` (k,), which judges it, and more: see ``InverseHvpResult``.
        """
        return solve_linear(b, self._solve)

    @ordinary
    def _solve(self, b: Any) -> InverseHvpResult:
        rows = self._rows(b)
        if self.inverse_ is None:
            self._need("_model", "solve")
            return self.method_(self._model, self._data, rows.source, self.hessian_perturbation_)
        x, info = rows.through(self._judged()).solve(rows.tensor)
        return rows.result(x, info)

    def path(self, b: Any, hessian_perturbations: Any) -> Any:
        """Return the solutions at many λ, for the price of about one solve where the method allows it.

        Parameters
        ----------
        b : array or tensor of shape (k, p)
            Right-hand sides, one per row.
        hessian_perturbations : iterable of float
            λ ≥ 0, n_λ of them; the fitted one need not be among them.

        Returns
        -------
        array or tensor of shape (n_λ, k, p)
            x at each λ, of b's kind, dtype and device.
        """
        if isinstance(hessian_perturbations, numbers.Number | str):
            hint = "Try a list of them."
            raise TypeError(must_be("hessian_perturbations", "several λ", repr(hessian_perturbations), hint))
        shifts = [check_hessian_perturbation(shift, "path") for shift in hessian_perturbations]

        def adjoint(gradients: Any) -> Any:
            parts = [self._path(rows, [shift])[0] for rows, shift in zip(gradients, shifts, strict=True)]
            return sum(parts, start=gradients.new_zeros(gradients.shape[1:]))

        return apply_linear(b, lambda rows: self._path(rows, shifts), adjoint)

    @ordinary
    def _path(self, b: Any, shifts: list[float]) -> Any:
        rows = self._rows(b)
        for shift in shifts:
            check_shift(shift, rows.tensor.dtype)
        self._factorised("path", "Call `solve` for each λ.")
        return rows.back(rows.through(self._judged()).path(rows.tensor, shifts))

    @ordinary
    def spectrum(self, *, n_probes: int = 10, steps: int = 60) -> Spectrum:
        """Return the eigenvalues of H (without λ) where they are known or cheap, else their density.

        Parameters
        ----------
        n_probes, steps : int
            Random directions of the density, and Lanczos steps of each: ``n_probes`` · ``steps`` products with H.

        Returns
        -------
        Spectrum
            ``eigenvalues``, ``weights``, ``exact``, and ``smallest`` and ``largest`` with bounds of their errors.
        """
        check_is_fitted(self, "n_features_in_")
        if not has_spectrum(self.inverse_):
            self._need("curvature_", "spectrum")
        seed = None if self.random_state is None else int(check_random_state(self.random_state).randint(2**31))
        curvature = getattr(self, "curvature_", None)
        return spectrum(curvature, self.inverse_, n_probes=n_probes, steps=steps, random_state=seed)

    def inverse_transform(self, X: Any) -> Any:
        """Return (H + λI) x for rows x (k, p), with the operator that the method inverts."""
        return apply_linear(X, self._inverse_transform)

    @ordinary
    def _inverse_transform(self, X: Any) -> Any:
        rows = self._rows(X)
        operator = self._exact() if self.inverse_ is None else self.inverse_.operator
        return rows.back(operator.apply(rows.tensor))

    @ordinary
    def residual(self, b: Any, x: Any) -> Any:
        """Return ‖(H + λI)x − b‖ / ‖b‖ (k,) against the exact curvature, whatever the method inverts."""
        B, X = self._rows(b), self._rows(x)
        if B.tensor.shape != X.tensor.shape:
            raise ValueError(must_be("x", f"of b's shape {tuple(b.shape)}", f"shape {tuple(x.shape)}"))
        residual = relative_residual(self._exact(), B.tensor, times_powers(X.tensor, X.powers - B.powers))
        return residual if isinstance(b, torch.Tensor) else residual.cpu().numpy()

    @ordinary
    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        r"""Return the held-out quadratic of rows that were not fitted: larger is better; −inf where A is indefinite.

        mean_i[ gᵢᵀzᵢ − ½ (m zᵢᵀH̄zᵢ − zᵢᵀhᵢzᵢ)/(m−1) − ½ zᵢᵀRzᵢ ], with gᵢ the rows' gradients, zᵢ the fitted inverse
        applied to gᵢ, H̄ the rows' mean GGN (or the inverter's own curvature where that is positive semi-definite by
        construction), hᵢ a row's own and R the penalty's Hessian.

        What it can tell, and what not:

        - Score on rows of the model's own training data. The gradients of fresh rows are larger than those that the
          curvature has seen, and favour another λ.
        - It repairs a curvature of few rows. The Hessian over the whole training set of a converged model wants λ ≈ 0.
        - Early stopping acts like a λ of some 0.15 to 0.5 / (learning rate · steps), which belongs in λ all the same.
        - Weight decay belongs in the loss (``weight_decay=``), where it is part of H and no λ need stand for it.

        Parameters
        ----------
        X : array of shape (m, ...) or data
            Held-out inputs, or data in any form that ``fit`` takes; plain rows for a fit on rows.
        y : array of shape (m, ...), default=None
            Their targets.
        sample_weight : array of shape (m,), default=None
            Weights.

        Returns
        -------
        float
            The score.
        """
        return quadratic_score(self._factorised("score"), self._held_out(X, y, sample_weight))

    def _held_out(self, X: Any, y: Any, sample_weight: Any) -> HeldOut:
        """Return what a score needs of rows that were not fitted."""
        check_is_fitted(self, "n_features_in_")
        if self._layout is None:
            X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
            given = check_sample_weight(sample_weight, len(X))
            rows = Rows.of(X, self.inverse_, scale=False).tensor
            return HeldOut(rows, rows.new_ones(len(rows)) if given is None else torch.from_numpy(given).to(rows))
        self._need("_model", "score")
        # fit(model, data) knows batches in a list; a search over `model=` passes samples in one.
        data = X if self.model is None and y is None else as_data(X, y)
        batches = self._batches(self._model, data, sample_weight)
        check_inputs(data, columns_of(self._data))
        curvature, gradients, weights = held_out_curvature(self.curvature_name_, self._model, batches)
        return HeldOut(gradients, weights, curvature.penalty, curvature.sample_factors)

    def _judged(self) -> Any:
        """Return the inverse, its solutions judged against the exact curvature where that is at hand and asked for."""
        if check_choice(self.check_residual, "check_residual", [True, False]):
            return self.inverse_.judged_by(getattr(self, "curvature_", None))
        return self.inverse_.unjudged()

    def _factorised(self, what: str, hint: str = "Call `solve`.") -> Any:
        check_is_fitted(self, "n_features_in_")
        if self.inverse_ is None:
            raise TypeError(must_be("method", f"a Method for {what}", "a function", hint))
        return self.inverse_

    def _at(self, shift: float) -> Any:
        """Return this inverter at another λ, over the same curvature: its factorisation is reused where it can be."""
        inverse, method = self._factorised("another λ"), self.method_
        check_shift(shift, inverse.dtype)
        found = (
            inverse.at(shift)
            if type(inverse).at is not InverseOperator.at
            else method.invert(self.curvature_, shift, self.verbose)
        )
        # Not `copy.copy`, which goes by the state of a pickle: without the curvature.
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, hessian_perturbation=shift, hessian_perturbation_=shift, inverse_=found)
        return other

    # -- names, shapes, faces --------------------------------------------------------------------------------------

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Return the p names of the columns: ``"fc1.weight[0,3]"``, or the input's own for plain rows."""
        check_is_fitted(self, "n_features_in_")
        if self._layout is None:
            return super().get_feature_names_out(input_features)
        return np.asarray(self._layout.feature_names(), dtype=object)

    def flatten(self, mapping: Mapping[str, Any] | Iterable[Any]) -> Any:
        """Return rows (k, p) of named tensors or arrays (k, *shape); without the k, one row.

        A sequence, such as ``torch.autograd.grad`` returns, is taken in the order of ``parameter_names_``.
        """
        return self._named().flatten(mapping)

    def unflatten(self, x: Any) -> dict[str, Any]:
        """Return named tensors or arrays (k, *shape) of rows (k, p)."""
        layout = self._named()
        check_columns(x, layout.feature_names())
        return layout.unflatten(x)

    def aslinearoperator(self) -> scipy.sparse.linalg.LinearOperator:
        """Return (H + λI)⁻¹ as a ``scipy.sparse.linalg.LinearOperator``."""
        return as_scipy(self._factorised("aslinearoperator", "Use `transform`."))

    def __sklearn_clone__(self) -> HessianInverter:
        """Share the model and the loss: a trained model is data, not a setting."""
        return clone_sharing(self)

    def __sklearn_tags__(self) -> Any:
        """Say that float32 stays float32 and that no target is needed."""
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        tags.target_tags.required = False
        return tags

    # -- files -----------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the curvature, and with it model, loss and data, where the factorisation serves without it.

        An inverter that is not fitted, or solves with the model, keeps them all.
        """
        state = dict(super().__getstate__())
        if getattr(state.get("inverse_"), "keeps_operator", True) is False:
            for name in ("curvature_", "_model", "_data"):
                state.pop(name, None)
            state.update({name: left_out(state[name]) for name in ("model", "loss")})
        return {name: pack(value) if name in ("device", "dtype") else value for name, value in state.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the attributes."""
        super().__setstate__(
            {name: unpack(state[name]) if name in ("device", "dtype") else state[name] for name in state}
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Return what pickle, joblib and copy rebuild the inverter from."""
        return copyreg.__newobj__, (type(self),), self.__getstate__()  # type: ignore[attr-defined]

    def __reduce__(self) -> Any:
        """Refuse a model by name where skops, which alone calls this, would stumble over its tensors."""
        state = self.__getstate__()
        if state.get("_model") is not None or isinstance(state["model"], torch.nn.Module):
            got = "a torch model, which an inverter needs to be fitted, and some methods to solve"
            raise ValueError(must_be("What skops writes", "without torch models", got, "Try pickle or joblib."))
        return super().__reduce__()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted inverse to a safetensors file, which ``skinvert.load`` reads anywhere.

        The file holds the factorisation, the settings and the names of the parameters, under a checksum. It holds no
        model, no data, no code, and no device; metadata requests are left out too. It takes the place of ``path`` once
        it is complete, so that an interrupted save loses nothing.

        Parameters
        ----------
        path : str or Path
            Overwritten where it exists.

        Raises
        ------
        ValueError
            For a method that solves with the model, such as ``"cg"``, and for settings that are not plain.

        Examples
        --------
        >>> import tempfile
        >>> X = np.array([[2.0, 0.0], [0.0, 2.0]])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     HessianInverter("direct", 2.0).fit(X).save(f"{folder}/inverse.safetensors")
        ...     load(f"{folder}/inverse.safetensors").transform(np.array([[4.0, 8.0]]))
        array([[1., 2.]])
        """
        check_is_fitted(self, "n_features_in_")
        if type(self) is not HessianInverter:
            raise TypeError(must_be("save", "called on a HessianInverter itself", type(self).__name__, "Try pickle."))
        if self.inverse_ is None or self.inverse_.keeps_operator:
            hint = "It solves with model and data, which a file of arrays cannot hold. Try pickle or joblib."
            raise ValueError(must_be("method for save", "one that factorises, such as 'direct'", self.method_, hint))
        state = self.__getstate__()
        for private in ("_metadata_request", "_skl_callbacks"):
            state.pop(private, None)
        state["answer"] = answer(self.inverse_)
        save_state(path, type(self).__name__, state, file_fields(HessianInverter), OPTIONAL)

    # -- helpers ---------------------------------------------------------------------------------------------------

    def _rows(self, b: Any) -> Rows:
        check_is_fitted(self, "n_features_in_")
        if isinstance(self.__dict__.get("_model"), TorchTwiceDifferentiable):
            self._model.check_unchanged()
        refuse_parameters(b)
        target = self.curvature_ if self.inverse_ is None else self.inverse_
        if self.model is not None and len(np.shape(b)) == 2 and np.shape(b)[1] != target.size:
            hint = "Rows are gradients, no inputs. In a pipeline they go to its last step: `pipe[-1].transform(b)`."
            raise ValueError(must_be("b", f"of shape (k, {target.size})", f"shape {tuple(np.shape(b))}", hint))
        if not isinstance(b, torch.Tensor):
            b = validate_data(self, self._by_name(b), dtype=[np.float64, np.float32], reset=False)
        return Rows.of(b, target)

    def _by_name(self, b: Any) -> Any:
        """Return ``b``; as an array where it is a frame whose columns are the parameters', which fit has not seen."""
        if not hasattr(b, "columns") or hasattr(self, "feature_names_in_"):
            return b
        names = self.get_feature_names_out().tolist()
        if self._layout is not None:
            check_columns(b, names)
        if not has_columns(b) or list(b.columns) != names:
            return b
        return check_array(b, dtype=[np.float64, np.float32])

    def _exact(self) -> LinearOperator:
        self._need("curvature_", "residual")
        return Shifted(self.curvature_, self.hessian_perturbation_)

    def _need(self, name: str, what: str) -> None:
        if getattr(self, name, None) is None:
            hint = "A saved or pickled factorisation leaves out model and data: call `fit` again."
            raise ValueError(must_be(f"{what}'s model and data", "at hand", "a loaded inverter", hint))

    def _named(self) -> ParameterLayout:
        check_is_fitted(self, "n_features_in_")
        if self._layout is None:
            raise TypeError(must_be("flatten and unflatten", "called after a fit on a model", "a fit on plain rows"))
        return self._layout


def load(path: str | os.PathLike[str], device: Any = None) -> HessianInverter:
    """Return the inverter that ``HessianInverter.save`` wrote: it transforms as the one saved, to the last bit.

    No code in the file is run: it holds numbers, plain values and names of skinvert's own classes. To fit again, give
    model and loss again.

    Parameters
    ----------
    path : str or Path
        The file.
    device : str or torch.device, default=None
        Where it solves: None is the CPU, wherever it was fitted; "auto" a GPU when there is one.

    Returns
    -------
    HessianInverter
        Fitted.

    Raises
    ------
    ValueError
        For a file that is truncated, altered, of a newer format, or none of ``save``'s.
    """
    where = resolve_device(device, torch.device("cpu"))
    state = load_state(path, HessianInverter.__name__, where, file_fields(HessianInverter), OPTIONAL)
    with refusing_damage(path, "one whose inverse gives another answer than it was saved with"):
        check_answer(state)
    inverter = object.__new__(HessianInverter)
    inverter.__setstate__(state)
    return inverter


def as_data(X: Any, y: Any) -> Any:
    """Return what ``fit(X, y)`` with a model means: a pair, or a list of samples where a search indexed a data set."""
    if y is not None:
        return (X, y)
    return Samples(X) if isinstance(X, list) else X

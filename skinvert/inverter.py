"""The estimator: ``HessianInverter().fit(model, data).transform(b)``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import ClassVar, Self, overload

import numpy as np
import scipy.sparse.linalg
import torch
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted, validate_data

from ._arguments import check_fits_rows, check_shifts
from ._autograd import ordinary
from ._callbacks import TakesCallbacks, followed
from ._check import check_choice, check_shift, must_be
from ._distributed import as_one, ranks_of
from ._fitting import SharesModel, as_it_is, fit_whole
from ._frames import (
    Columned,
    check_columns,
    check_inputs,
    columns_of,
    refuse_inputs,
    refuse_parameters,
    without_names,
)
from ._lazy import StaysLazy, check_in_memory, is_lazy, over_rows
from ._linear_map import apply_linear, solve_linear
from ._namespaces import as_tensor, in_kind_of, is_foreign, of_kind, to_numpy
from ._rows import InFloat64, Rows
from ._scaling import times_powers
from ._types import (
    Array,
    Autocast,
    Data,
    Decay,
    Device,
    DType,
    Globs,
    LossLike,
    Partition,
    ProcessGroup,
    RandomState,
    State,
    TrainedModel,
)
from .answers import OPTIONAL, answer, check_answer, file_fields
from .at_hand import AtHand
from .curvature import Sampled
from .data import as_data
from .files import UNSAVED, Saved, savable
from .fitting import Fitting
from .methods.base import InverseOperator, Method, relative_residual
from .operators import as_scipy
from .persistence import require_present
from .posterior import Posterior, own_spectrum
from .results import InverseHvpResult, Spectrum
from .scores import HeldOut, held_out, held_out_rows, quadratic_score
from .solvers.extremes import spectrum
from .summary import Summary
from .system import Function, random_seed

__all__ = ["HessianInverter"]


@savable
class HessianInverter(TakesCallbacks, Summary, SharesModel, Fitting, AtHand, Posterior, StaysLazy, Saved):
    r"""Solve (H + λI) x = b for a trained model's curvature H, one right-hand side per row.

    ``fit(model, data)``, ``fit(X, y)`` with ``model`` set, or ``fit(X)`` on plain rows, whose curvature is that of
    linear least squares, H = Σ wᵢxᵢxᵢᵀ / Σ wᵢ. The factorisation is done in ``fit``; the user's model is never changed.

    Parameters
    ----------
    method : str, InversionMethod or Method, default="auto"
        A name in the ``InversionRegistry`` or a configured instance, such as ``CG(rtol=1e-6)``.
    hessian_perturbation : float or str, default=0.0
        λ ≥ 0, on the scale of the mean loss. Or a share of the mean eigenvalue of H: ``"1e-2 rel"`` is 0.01 · tr(H) / p
        of the curvature as it is inverted, penalty included, which ``fit`` finds: exactly where its diagonal costs
        little, else to some 1 % by about 80 products.
    curvature : str, SampledGGN or SampledFisher, default="auto"
        H: ``"hessian"``, ``"ggn"``, ``"fisher"``, ``"empirical_fisher"``, or, at a cost that does not grow with the
        outputs, ``"sampled_ggn"`` by random signs, which is ``SampledGGN()``, and ``"sampled_fisher"`` by one sampled
        label a row, ``SampledFisher()``. ``"auto"`` is the Hessian, save for methods that are defined on another
        curvature: of kfac and ekfac it is the GGN, or the Fisher where the loss takes (log-)probabilities.
    model : nn.Module, skorch net, fitted scikit-learn model, Pipeline of these or TwiceDifferentiable, default=None
        What ``fit(X, y)`` reads, the form that pipelines and searches call. Shared by clones, never copied. In a
        pipeline that ends in this inverter ``fit`` and ``score`` run through its steps; right-hand sides, which are no
        inputs, go to the last one: ``pipe[-1].transform(b)``.
    loss : str, torch loss module, Loss or callable, default=None
        The loss of a bare module: ``"cross_entropy"``, ``"mse"``, ``"bce_with_logits"``, ``"nll"``, ``"huber"``,
        ``"poisson_nll"``, ``"bce"``, ``"smooth_l1"``, a name of ``register_loss``, a torch loss module, a ``Loss``, or
        a callable (output, target) that is a mean or a sum over rows, or one value per row. None for a model that is
        given ``labels`` and returns its own ``loss`` beside ``logits``, as Hugging Face's are.
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
    autocast : {"bfloat16"} or torch.bfloat16, default=None
        Let the method work with products, or factors, whose forward and backward passes run under ``torch.autocast``;
        the model in float32, as losses, right-hand sides and all sums. ``direct``, ``cg``, ``minres`` and ``lissa``
        solve the exact system all the same: they work in rounds, each of which ends with an exact product in float32.
        An approximate method's solutions are judged against that system. It pays where bfloat16 is much faster than
        float32, on GPUs with tensor cores; on a CPU without bfloat16 units it does not.
    random_state : int, RandomState or None, default=None
        For stochastic methods and curvatures.
    check_residual : bool, default=True
        Whether an approximate method spends one product with the exact curvature per solve to report its true
        ``residual`` and to warn where x = 0 would be better. False leaves ``residual`` NaN and ``converged`` False.
    checkpoint : str or Path, default=None
        A file to which ``fit`` writes what it has done, at most every second and for at most 5 % of its time, and from
        which the same fit goes on after an interruption, a kill too, to the same result. It is removed once the fit is
        done, and a file of any other fit (another model, other data, settings or versions) is refused. In a folder that
        exists each fit has its own file, as a search needs it. For ``"arnoldi"``, ``"nystroem"``, ``"kfac"`` and
        ``"ekfac"``.
    process_group : None, "world" or ProcessGroup, default=None
        The processes of ``torch.distributed`` that fit together, each with its own share of the data as ``fit``'s: rows
        of its own, perhaps none, or a DataLoader with a DistributedSampler, each of whose rows counts once. What is
        fitted is that of all rows, on every rank. None fits this process's data alone, whatever is initialised;
        "world" is the default group.
    verbose : int, default=0
        1 says on stderr what was chosen and why, and shows progress bars on long work.

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
        H itself; neither pickled nor saved, as ``model``, ``loss`` and data, where the factorisation serves without it.
    curvature_name_ : str
        Which curvature; ``"gram"`` for plain rows.
    hessian_perturbation_ : float
        λ.
    parameter_names_ : list of str
        Of the selected parameters; model-based fits only.
    gradient_norm_ : float
        ‖∇L(θ)‖, small at a minimum; model-based fits only.
    eigenvalues_ : ndarray of shape (p,)
        Of H, ascending, where the method computed a spectrum; of plain rows, under scikit-learn's
        ``array_api_dispatch``, an array of their own library.

    Methods
    -------
    fit(X, y=None, sample_weight=None)
        Fit the inverse of a model's curvature, or of plain rows.
    transform(X)
        The solutions, one per row.
    solve(b, x0=None)
        The solutions, and what is known of them: ``x, info``.
    path(b, hessian_perturbations)
        The solutions at many λ.
    inverse_transform(X)
        (H + λI) x.
    residual(b, x)
        ‖(H + λI)x − b‖ / ‖b‖ against the exact curvature.
    quadratic(G, B=None)
        gᵀ(H + λI)⁻¹b, with bounds that hold.
    spectrum()
        Eigenvalues of H, or their density.
    score(X, y=None)
        The held-out quadratic, for searches over λ.
    covariance, sample, log_det, log_evidence, predictive_variance
        Of the Gaussian with H + λI as its precision.
    flatten, unflatten
        Between rows (k, p) and named parameters.
    save(path)
        To a file, which ``skinvert.load`` reads anywhere.

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

    method_: Method | Function
    inverse_: InverseOperator | None
    feature_names_in_: np.ndarray
    eigenvalues_: np.ndarray
    # A group of processes is no setting of which there could be two.
    _shared: ClassVar[tuple[str, ...]] = (*SharesModel._shared, "process_group")

    def __init__(
        self,
        method: str | Method = "auto",
        hessian_perturbation: float | str = 0.0,
        *,
        curvature: str | Sampled = "auto",
        model: TrainedModel | None = None,
        loss: LossLike | None = None,
        weight_decay: Decay = 0.0,
        params: Globs = None,
        blocks: Partition = None,
        batch_size: int | None = None,
        device: Device = None,
        dtype: DType = None,
        autocast: Autocast = None,
        random_state: RandomState = None,
        check_residual: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
        process_group: ProcessGroup = None,
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
        self.autocast = autocast
        self.random_state = random_state
        self.check_residual = check_residual
        self.checkpoint = checkpoint
        self.process_group = process_group
        self.verbose = verbose

    # -- fit -------------------------------------------------------------------------------------------------------

    @followed
    @ordinary
    def fit(self, X: TrainedModel | Data, y: Data | None = None, sample_weight: Array | None = None) -> Self:
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
        ranks = ranks_of(require_present(self.process_group, "process_group"))

        def fit(fresh: HessianInverter) -> None:
            with as_one(ranks, "fit"):
                fresh._ranks = ranks
                fresh._fit_at(X, y, sample_weight)

        fit_whole(self, fit)
        return self

    # -- solve -----------------------------------------------------------------------------------------------------

    @overload
    def transform(self, X: torch.Tensor) -> torch.Tensor: ...

    @overload
    def transform(self, X: np.ndarray) -> np.ndarray: ...

    @overload
    def transform(self, X: Array) -> Array: ...

    def transform(self, X: Array) -> Array:
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
            A Dask array gives a lazy one, whose blocks of rows are solved when they are computed.
        """
        if is_lazy(X):
            return self._lazily("transform", X)
        self._check_namespace(X, "transform")
        return self.solve(X).x

    @ordinary
    def fit_transform(self, X: Array, y: Array | None = None, **fit_params: Array) -> Array:
        """Fit plain rows and return the solutions for them.

        With a model the inputs are no right-hand sides: transform gradients instead.
        """
        check_fits_rows(X, self.model)
        return self.fit(X, y, **fit_params).transform(X)

    def solve(self, b: Array, x0: Array | None = None) -> InverseHvpResult:
        """Return the solutions and what is known of them, ``x, info``.

        Parameters
        ----------
        b : array or tensor of shape (k, p)
            Right-hand sides, one per row.
        x0 : array or tensor of shape (k, p), (1, p) or (p,), default=None
            Where a method that iterates (``cg``, ``minres``, ``lissa``) starts, in place of its own setting: the
            solutions at nearby parameters, say. Copied, never written to, and a constant where x is differentiated.

        Returns
        -------
        InverseHvpResult
            ``x`` as ``transform`` returns it; ``info["residual"]`` (k,), ‖(H + λI)x − b‖ / ‖b‖ against the exact
            curvature, ``info["converged"]`` (k,), which judges it, and more: see ``InverseHvpResult``.
        """
        check_in_memory((b, x0), "b and x0", "Try `transform`, which takes Dask arrays, or `map_blocks`.")
        x0 = as_tensor(x0) if is_foreign(x0) else x0
        if not is_foreign(b):
            return solve_linear(b, self._solve, x0)
        x, info = solve_linear(as_tensor(b), self._solve, x0)
        told = {key: of_kind(b, part) if isinstance(part, torch.Tensor) else part for key, part in info.items()}
        return InverseHvpResult(of_kind(b, x), told)

    @ordinary
    def _solve(self, b: Array, x0: Array | None = None) -> InverseHvpResult:
        with self._together("solve"):
            return self._solved(b, x0)

    def _solved(self, b: Array, x0: Array | None) -> InverseHvpResult:
        rows = self._rows(b)
        if not isinstance(self.method_, Method):
            if x0 is not None:
                raise ValueError(must_be("x0", "None for a method that is a function", f"a {type(x0).__name__}"))
            function, model = self.method_, self._at_hand("_model", "solve")
            result: InverseHvpResult = function(model, self._data, rows.source, self.hessian_perturbation_)
            return result
        inverse: InverseOperator = rows.through(self._judged("solve"))
        if inverse.takes_products:
            self._check_alike("solve", rows)
        if x0 is not None:
            inverse = inverse.started_at(self._start(x0, rows))
        return rows.result(*inverse.solve(rows.tensor))

    def _start(self, x0: Array, rows: Rows) -> torch.Tensor:
        if isinstance(x0, Columned):
            check_columns(x0, self.get_feature_names_out().tolist())
        return rows.start(x0)

    def path(self, b: Array, hessian_perturbations: Iterable[float]) -> Array:
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
        shifts = check_shifts(hessian_perturbations)

        def adjoint(gradients: torch.Tensor) -> Array:
            parts = [self._path(rows, [shift])[0] for rows, shift in zip(gradients, shifts, strict=True)]
            return sum(parts, start=gradients.new_zeros(gradients.shape[1:]))

        return in_kind_of(b, lambda b: apply_linear(b, lambda rows: self._path(rows, shifts), adjoint))

    @ordinary
    def _path(self, b: Array, shifts: list[float]) -> Array:
        with self._together("path"):
            rows = self._rows(b)
            for shift in shifts:
                check_shift(shift, rows.tensor.dtype)
            inverse = self._judged("path", "Call `solve` for each λ.")
            if inverse.takes_products:
                self._check_alike("path", rows, shifts)
            return rows.back(rows.through(inverse).path(rows.tensor, shifts))

    @ordinary
    def spectrum(self, *, of: str = "curvature", n_probes: int = 10, steps: int = 60) -> Spectrum:
        """Return the eigenvalues of H (without λ) where they are known or cheap, else their density.

        Parameters
        ----------
        of : {"curvature", "inverse"}, default="curvature"
            Of H itself, or of what the method inverts in its place: the Kronecker products of ``kfac``, say.
        n_probes, steps : int
            Random directions of the density, and Lanczos steps of each: ``n_probes`` · ``steps`` products with H.

        Returns
        -------
        Spectrum
            ``eigenvalues``, ``weights``, ``exact``, and ``smallest`` and ``largest`` with bounds of their errors.
        """
        check_is_fitted(self, "n_features_in_")
        if check_choice(of, "of", ["curvature", "inverse"]) == "inverse" and self._factorised("spectrum").approximate:
            return own_spectrum(self._factorised("spectrum"))
        if self.inverse_ is None or self.inverse_.all_eigenvalues is None:
            self._at_hand("curvature_", "spectrum")
        seed = None if self.random_state is None else random_seed(self.random_state)
        known = None if self.inverse_ is None else self.inverse_.all_eigenvalues
        curvature, settings = vars(self).get("curvature_"), {"n_probes": n_probes, "steps": steps}
        with self._together("spectrum", of_all=known is None):
            return spectrum(curvature, known, **settings, random_state=seed, verbose=self.verbose)

    def inverse_transform(self, X: Array) -> Array:
        """Return (H + λI) x for rows x (k, p), with the operator that the method inverts."""
        if is_lazy(X):
            return self._lazily("inverse_transform", X)
        self._check_namespace(X, "inverse_transform")
        return in_kind_of(X, lambda X: apply_linear(X, self._inverse_transform))

    @ordinary
    def _inverse_transform(self, X: Array) -> Array:
        inverse = vars(self).get("inverse_")
        of_all = inverse is not None and inverse.keeps_operator
        with self._together("inverse_transform", of_all=of_all):
            rows = self._rows(X)
            if of_all:
                self._check_alike("inverse_transform", rows)
            operator = self._exact() if inverse is None else inverse.operator
            return rows.back(operator.apply(rows.tensor))

    @ordinary
    def residual(self, b: Array, x: Array) -> Array:
        """Return ‖(H + λI)x − b‖ / ‖b‖ (k,) against the exact curvature, whatever the method inverts."""
        with self._together("residual", of_all=True):
            residual = self._residual(b, x)
        return residual if isinstance(b, torch.Tensor) else residual.cpu().numpy()

    def _residual(self, b: Array, x: Array) -> torch.Tensor:
        B, X = self._rows(b), self._rows(x)
        if B.tensor.shape != X.tensor.shape:
            raise ValueError(must_be("x", f"of b's shape {tuple(b.shape)}", f"shape {tuple(x.shape)}"))
        return relative_residual(self._exact(), B.tensor, times_powers(X.tensor, X.powers - B.powers))

    @ordinary
    def score(self, X: Data, y: Data | None = None, sample_weight: Array | None = None) -> float:
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

    def _held_out(self, X: object, y: object, sample_weight: object) -> HeldOut:
        """Return what a score needs of rows that were not fitted."""
        check_is_fitted(self, "n_features_in_")
        if self._layout is None:
            X = validate_data(self, to_numpy(X), dtype=[np.float64, np.float32], reset=False)
            return held_out_rows(Rows.of(X, self._factorised("score"), scale=False).tensor, sample_weight)
        # fit(model, data) knows batches in a list; a search over `model=` passes samples in one.
        data = X if self.model is None and y is None else as_data(X, y)
        model = self._at_hand("_model", "score")
        check_inputs(data, columns_of(self._data))
        return held_out(model, self.curvature_name_, data, self.batch_size, sample_weight)

    def _at(self, shift: float) -> HessianInverter:
        """Return this inverter at another λ, over the same curvature: its factorisation is reused where it can be."""
        inverse = self._factorised("another λ")
        inverse = inverse.at(check_shift(shift, inverse.dtype))
        # Not `copy.copy`, which goes by the state of a pickle: without the curvature.
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, hessian_perturbation=shift, hessian_perturbation_=shift, inverse_=inverse)
        return other

    # -- faces -----------------------------------------------------------------------------------------------------

    def aslinearoperator(self) -> scipy.sparse.linalg.LinearOperator:
        """Return (H + λI)⁻¹ as a ``scipy.sparse.linalg.LinearOperator``."""
        return as_scipy(self._factorised("aslinearoperator", "Use `transform`."))

    def __sklearn_tags__(self) -> Tags:
        """Say that float32 stays float32, that no target is needed, and that arrays stay of their library."""
        tags = super().__sklearn_tags__()
        # Of plain rows and right-hand sides; what a model is given is its own.
        tags.array_api_support = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        tags.target_tags.required = False
        return tags

    # -- files -----------------------------------------------------------------------------------------------------

    def _serves_alone(self) -> bool:
        inverse = vars(self).get("inverse_")
        return inverse is not None and not inverse.keeps_operator

    def _file_state(self) -> State:
        if not self._serves_alone():
            hint = "It solves with model and data, which a file of arrays cannot hold. Try pickle or joblib."
            raise ValueError(must_be("method for save", "one that factorises, such as 'direct'", self._used, hint))
        # Where it was fitted is of no use elsewhere.
        left_out = {*UNSAVED, "checkpoint"}
        state = {name: value for name, value in self.__getstate__().items() if name not in left_out}
        if "eigenvalues_" in state:
            state["eigenvalues_"] = to_numpy(state["eigenvalues_"])
        return {**state, "answer": answer(self._factorised("save"))}

    @classmethod
    def _file_fields(cls) -> tuple[Mapping[str, str], frozenset[str]]:
        return {name: words for name, words in file_fields(cls).items() if name != "checkpoint"}, OPTIONAL

    @classmethod
    def _restored(cls, state: State) -> Self:
        check_answer(state)
        return super()._restored({**state, "checkpoint": None})

    # -- helpers ---------------------------------------------------------------------------------------------------

    def _rows(self, b: Array, *, double: bool = False) -> Rows:
        check_is_fitted(self, "n_features_in_")
        if (model := vars(self).get("_model")) is not None:
            model.check_unchanged()
        refuse_parameters(b)
        target = self.curvature_ if self.inverse_ is None else self.inverse_
        if self.model is not None:
            refuse_inputs(b, target.size)
        if not isinstance(b, torch.Tensor):
            if isinstance(b, Columned) and "feature_names_in_" not in vars(self):
                # Columns that are the parameters', which fit has not seen.
                b = without_names(b, self.get_feature_names_out().tolist(), strict=self._layout is not None)
            b = validate_data(self, b, dtype=[np.float64, np.float32], reset=False)
        return Rows.of(b, InFloat64(target.size, target.device) if double else target)

    def _lazily(self, method: str, X: Array) -> Array:
        """Return what a method gives of rows (k, p) in a Dask array, of the dtype that it has for rows in memory."""
        check_is_fitted(self, "n_features_in_")
        size = self.n_features_in_
        if X.ndim != 2 or X.shape[1] != size:
            raise ValueError(must_be("A Dask array", f"of shape (k, {size})", f"shape {X.shape}"))
        if self._ranks is not None and self._factorised(method).takes_products:
            hint = "Its blocks would be solved in another order on each rank. Try rows in memory, or another method."
            raise ValueError(
                must_be("Rows for what several processes solve together", "in memory", "a Dask array", hint)
            )
        dtype = self.solve(np.zeros((1, size), X.dtype)).x.dtype
        return over_rows(as_it_is(self), method, X, size, dtype)

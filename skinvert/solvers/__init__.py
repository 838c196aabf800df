"""Solvers on rows: they see an operator, and know no method."""

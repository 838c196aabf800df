"""scikit-learn's users: a pipeline on a data frame, and by whose rows a prediction was made."""

import numpy as np
import pandas as pd
from sklearn.base import clone
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from skinvert import InfluenceFunction

rng = np.random.default_rng(0)
people = pd.DataFrame(
    {
        "town": rng.choice(["Bath", "Deal", "Rye"], 150),
        "age": rng.integers(18, 80, 150).astype(float),
        "income": rng.lognormal(10, 0.5, 150),
    },
    index=[f"person {i}" for i in range(150)],
)
left = pd.Series(
    np.where(people["age"] / 30 + (people["town"] == "Rye") + rng.logistic(size=150) > 2, "yes", "no"), people.index
)
train, test = (people[:120], left[:120]), (people[120:], left[120:])
columns = make_column_transformer((OneHotEncoder(), ["town"]), (StandardScaler(), ["age", "income"]))
pipeline = make_pipeline(columns, LogisticRegression(C=0.5, tol=1e-10, max_iter=1000)).fit(*train)

# begin skinvert
influence = InfluenceFunction(removal="newton").set_output(transform="pandas").fit(pipeline, train)
scores = influence.transform(test)
helpful = influence.top(test, k=3).rows
# end skinvert

# Retraining without each person; the columns are prepared as they were.
X, X_test = columns.transform(train[0]), columns.transform(test[0])


def row_losses(model):
    return -model.predict_log_proba(X_test)[np.arange(len(X_test)), (test[1] == "yes").astype(int)]


def without(i):
    kept = np.arange(len(X)) != i
    return row_losses(clone(pipeline[-1]).fit(X[kept], train[1].to_numpy()[kept]))


actual = np.array([without(i) for i in range(len(X))]).T - row_losses(pipeline[-1])[:, None]
assert list(scores.index) == list(test[0].index)
assert list(scores.columns) == list(train[0].index)
assert np.corrcoef(scores.to_numpy().ravel(), actual.ravel())[0, 1] > 0.9999
# Newton's step is not a retraining: 2 % of the largest change apart.
assert np.abs(scores.to_numpy() - actual).max() < 0.03 * np.abs(actual).max()
best = train[0].index[actual.argmax(axis=1)]
assert (helpful[0].to_numpy() == best).mean() > 0.9

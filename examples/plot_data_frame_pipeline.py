"""
Influence in a pipeline on a data frame
=======================================

A ``LogisticRegression`` behind a ``ColumnTransformer``, as it was fitted: which passengers made the model say so? Rows
keep the names that the frame's index gives them.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from skinvert import InfluenceFunction
from skinvert.plotting import TopRowsDisplay

# %%
# Passengers, by name: women and the first class are saved more often.
rng, n = np.random.default_rng(0), 400
frame = pd.DataFrame(
    {
        "sex": rng.choice(["female", "male"], n),
        "class": rng.choice(["first", "second", "third"], n, p=[0.25, 0.25, 0.5]),
        "age": rng.gamma(6, 5, n).round(),
        "fare": rng.lognormal(3, 0.7, n).round(1),
    },
    index=[f"passenger {i:03d}" for i in range(n)],
)
logit = 2 * (frame["sex"] == "female") + (frame["class"] == "first") - 0.03 * frame["age"] - 0.5
saved = pd.Series(np.where(rng.random(n) < 1 / (1 + np.exp(-logit)), "saved", "lost"), index=frame.index)

# %%
# The pipeline is what InfluenceFunction takes, with the frame that it was fitted on: its last step is the model.
columns = make_column_transformer((OneHotEncoder(), ["sex", "class"]), (StandardScaler(), ["age", "fare"]))
train, test = (frame[:380], saved[:380]), (frame[380:], saved[380:])
pipeline = make_pipeline(columns, LogisticRegression(C=1.0)).fit(*train)
influence = InfluenceFunction(removal="newton").set_output(transform="pandas").fit(pipeline, train)
scores = influence.transform(test)  # A frame: test passengers by training passengers
print(scores.iloc[:3, :3])

# %%
# The two test passengers whom the model gets most wrong, and who made it so: the rows that harm them most.
p = pipeline.predict_proba(test[0])[np.arange(20), np.searchsorted(pipeline.classes_, test[1])]
worst = np.argsort(p)[:2]
harm = TopRowsDisplay.from_estimator(
    influence, test[0].iloc[worst], test[1].iloc[worst], train=train, k=5, harmful=True
)
harm.figure_.suptitle("Test passengers the model gets most wrong, and the rows that harm them most", fontsize=10)
for i in range(2):
    print(harm.table(i)[1])

output = Path(__file__).parent / "output" / "data_frame_pipeline.png"
output.parent.mkdir(exist_ok=True)
harm.figure_.savefig(output, dpi=120)

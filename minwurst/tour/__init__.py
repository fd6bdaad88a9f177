"""A tour of Würstchen on one page, made by this project's own code on the miniature.

    python -m minwurst.tour                       # runs/tour/tour.html
    python -m minwurst.tour --full                # also repeat the panels that train
    python -m minwurst.tour.exercises 3           # exercise 3 of 8; 0 lists them

| file | what it is |
|---|---|
| sampling.py | the panels that only sample |
| training.py | the panels that train; `results/` has what they gave |
| bench.py | what the panels work with |
| theory.py | the published model's sizes, and the derivations |
| page.py | from panels to HTML |
| exercises.py, checks.py, solutions.py | eight exercises, what checks them, and the answers |
"""

"""Scores of a model, base against tuned, and the page that shows them.

perplexity, classify      on prepared rows: one pass, token or row weighted
answers, choice           on questions: generation, or likelihood of the options
retention                 what was gained and what was forgotten
plots, report             pictures and report.html, from the run folder alone
"""

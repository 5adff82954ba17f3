"""``lorakeet verify``: each file here proves one promise about a run and keeps the figures.

adapter        the bytes on disk are those that were trained, and load into the base
accumulation   how a step is cut into micro-batches changes memory and nothing else
resume         k steps, a stop and k more leave the same bytes as 2k steps
merge          one merged model, read from disk, answers like base + adapter
data           every row that was read is trained, validated or listed as dropped
"""

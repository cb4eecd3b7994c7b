"""What quantizing would do to the captured activations: the error of each number format at each site of each layer.

In: a finished capture, its summary, names of formats. Out: quantization.parquet, and the formats as functions of tensors for
probes. A newcomer may add a format in `formats`, together with its oracle in the tests.
"""

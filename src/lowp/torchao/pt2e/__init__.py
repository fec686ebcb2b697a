"""Quantization of an exported graph, as torchao names it: torch.export -> prepare_pt2e -> calibrate -> convert_pt2e.

    spec.py       what a quantizer writes on the nodes of a graph: which tensor is seen in which integers, by which observer
    watch.py      the observers and fake quantizers: torch's own, under torchao's names
    prepare.py    put an observer where a node asks for one; those that must agree are one object
    convert.py    put quantize and dequantize where the observers were, with their scales; fold weights into integers
    xnnpack.py, x86.py     two quantizers: which operators, which integers
    graph_edits.py         train and eval of an exported graph, batch norm into convolutions, names of attributes

The graph that comes out holds torch's `quantized_decomposed` operators, which ExecuTorch and inductor recognise and which run
as they are.

    value = (q - zero_point) * scale

Source: Jacob et al., arXiv 1712.05877; the operators' meaning is torch's `torch/ao/quantization/fx/_decomposed.py`.
"""

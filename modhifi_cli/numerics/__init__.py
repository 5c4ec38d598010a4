"""The mathematics of the method, on plain tensors: rows → moments → contributions → scores, selection, compensation.

Nothing here knows a module, a device, a file or a setting. Rows and weights are component-major (feature = component ×
features_per_component + offset), sums are float64, index tensors are sorted and named `kept` or `removed`. Equation
numbers (M1) … are those of the project's method page; the source is ModHiFi, arXiv:2511.19566.
"""

"""A bundle in a browser or in Node: ONNX Runtime Web, preprocessing in JavaScript, and a page."""

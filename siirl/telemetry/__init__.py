"""What a run tells: metrics, TensorBoard, traces, the progress display and the report."""

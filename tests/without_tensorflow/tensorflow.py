"""What a process that a test starts finds in place of TensorFlow, which takes seconds to import."""

raise ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")

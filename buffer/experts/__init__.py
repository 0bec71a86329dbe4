"""Expert data: tasks, tokenizers and the noise that demonstrates backspace."""

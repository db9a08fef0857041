"""Samples of a task: rows, chats, pictures and sound."""

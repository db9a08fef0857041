"""Samples of a task: rows, chats, images and audio."""

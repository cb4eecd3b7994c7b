"""Files as this project writes and reads them: whole or absent, private where needed, sealed against damage.

In: bytes and paths. Out: a file that is complete under its name, or an error. It knows nothing of what is in a file.
A newcomer uses `atomic.write_atomic` and `sealed.write_sealed`; nothing else in the project opens a file for writing.
"""

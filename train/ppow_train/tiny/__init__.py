"""A small real target with two drafters, trained from the Python standard library's own source.

The embedded default of this project: everything runs on it, on two CPU cores, with nothing fetched. The target
learns the whole text; the drafters learn it without one domain (the test suites), which is the situation of every
user whose traffic a public drafter never saw. Left out: anything that only large models need.
"""

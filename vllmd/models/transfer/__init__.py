"""The parts of the downloader (models/download puts them together): connections, answers, work, journal, sums."""

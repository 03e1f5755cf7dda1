from sslvit.__main__ import evaluate; evaluate(__file__)

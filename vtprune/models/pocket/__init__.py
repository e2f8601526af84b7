# SPDX-License-Identifier: Apache-2.0
"""Small trained vision-language models that ship with the package, and the code that made them.

``data`` draws PocketVQA pictures and questions, ``vocab`` turns words into ids, ``batch`` renders many pictures on a
device, ``model`` builds the network, ``train`` trains it and ``export`` writes the folder that ``transformers`` reads.
"""

# SPDX-License-Identifier: Apache-2.0
"""Small trained vision-language models that ship with the package, and the code that made them.

``data`` and ``worlds`` draw PocketVQA pictures and questions, ``sprites`` and ``easyvqa`` add pictures by others,
``vocab`` turns words into ids, ``batch`` renders many pictures on a device. ``model``, ``next`` and ``qwen`` build the
networks, ``families`` says what training must know of each, ``plans`` mixes the batches and ``train`` trains;
``train_scorer`` trains IDPruner's scorer on a model that stands still. ``export`` writes the folders that
``transformers`` reads, with ``layout`` for their files and ``card`` for their cards.
"""

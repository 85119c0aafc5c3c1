# The review app in a container. NOT TESTED: no container could be run where this was written.
FROM node:22-slim AS page
WORKDIR /src/web
COPY web/package.json web/package-lock.json ./
RUN npm ci
COPY web ./
RUN npx vite build

FROM python:3.11-slim
RUN useradd --create-home --uid 1000 histokit && mkdir /study && chown histokit /study
WORKDIR /src
COPY pyproject.toml constraints.txt settings.ini README.md LICENSE CHANGELOG.md hatch_build.py ./
COPY histokit histokit
COPY nbs nbs
COPY params params
COPY --from=page /src/web/dist web/dist
# TORCH_INDEX: the index of PyTorch's builds for processors only, which saves about 5 GB (docker build --build-arg TORCH_INDEX=URL)
ARG TORCH_INDEX=
RUN pip install --no-cache-dir -c constraints.txt ${TORCH_INDEX:+--index-url $TORCH_INDEX} torch torchvision \
 && pip install --no-cache-dir -c constraints.txt -e '.[review,postgres]'
USER histokit
VOLUME /study
EXPOSE 8700
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s \
  CMD python -c "import urllib.request as u; u.urlopen('http://127.0.0.1:8700/api/health', timeout=4)"
# Others can reach this address, so people log in; the log shows the code that the first administrator needs.
CMD ["histokit", "review", "/study", "--host", "0.0.0.0", "--port", "8700", "--no-browser"]

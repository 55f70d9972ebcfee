//! The CRDs, as chart templates: Helm never upgrades what lies in a chart's `crds/` folder.

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;

use super::{Generated, NOTICE, indent};

pub(super) fn files() -> Result<Vec<Generated>> {
    crds::all_crds().iter().map(file).collect()
}

fn file(crd: &CustomResourceDefinition) -> Result<Generated> {
    let name = crd.metadata.name.clone().context("a CRD without a name")?;
    let spec = serde_yaml::to_string(&crd.spec).with_context(|| format!("failed to render {name}"))?;
    ensure!(
        !spec.contains("{{"),
        "{name} contains a template mark, which Helm would interpret"
    );
    let text = format!(
        "{NOTICE}\
{{{{- if .Values.crds.install }}}}
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata:
  name: {name}
  labels:
    {{{{- include \"peregrine.labels\" . | nindent 4 }}}}
  {{{{- if .Values.crds.keep }}}}
  annotations:
    helm.sh/resource-policy: keep
  {{{{- end }}}}
spec:
{}\
{{{{- end }}}}
",
        indent(&spec, 2)
    );
    let plural = &crd.spec.names.plural;
    Ok(Generated {
        path: format!("charts/peregrine/templates/crds/{plural}.yaml"),
        text,
    })
}

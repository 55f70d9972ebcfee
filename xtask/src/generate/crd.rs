//! The CRDs, as chart templates: Helm never upgrades what lies in a chart's `crds/` folder.

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use serde_json::Value;

use super::{Generated, NOTICE, indent};

pub(super) fn files() -> Result<Vec<Generated>> {
    crds::all_crds().iter().map(file).collect()
}

fn file(crd: &CustomResourceDefinition) -> Result<Generated> {
    let name = crd.metadata.name.clone().context("a CRD without a name")?;
    let mut spec = serde_json::to_value(&crd.spec).with_context(|| format!("failed to read {name}"))?;
    without_unknown_formats(&mut spec);
    let spec = serde_yaml::to_string(&spec).with_context(|| format!("failed to render {name}"))?;
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

/// The API server warns of formats that it does not know, such as `uint32`. The limits beside them say the same.
fn without_unknown_formats(value: &mut Value) {
    match value {
        Value::Object(map) => {
            if map
                .get("format")
                .and_then(Value::as_str)
                .is_some_and(|format| format.starts_with("uint"))
            {
                map.remove("format");
            }
            map.values_mut().for_each(without_unknown_formats);
        }
        Value::Array(list) => list.iter_mut().for_each(without_unknown_formats),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_crd_is_rendered_without_formats_that_the_api_server_warns_of() {
        for file in files().unwrap() {
            assert!(!file.text.contains("format: uint"), "{}", file.path);
            assert!(file.text.contains("minimum: 0"), "{} has lost its limits", file.path);
        }
    }
}
